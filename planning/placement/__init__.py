"""Which models share which devices, in which shape."""
