"""Prefect flows: thin jobs around what the floors below compute."""

import os

# Prefect decides on import whether it reports its use.
os.environ.setdefault("DO_NOT_TRACK", "1")
