"""The main job from a checkpoint to streams that nothing broke, and the report of it."""
