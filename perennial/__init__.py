"""The main job from the command line, the settings, and the test harness."""
