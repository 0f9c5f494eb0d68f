"""Measurements on real devices: step times, links, and the fingerprint of the machine they hold for."""
