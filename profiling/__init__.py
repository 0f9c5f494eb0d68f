"""Measurements on real devices: step times and links."""
