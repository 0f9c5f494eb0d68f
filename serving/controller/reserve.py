"""Space kept for finishing what was begun when the disk is full."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Reserve:
    """A file that only takes space. Giving it up frees `size_bytes` without having to write anything."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path, self._size_bytes = path, size_bytes
        self.held = path.is_file() and path.stat().st_size == size_bytes

    def take(self) -> None:
        """Hold the reserve, if there is room for it."""
        try:
            with open(self._path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size_bytes)
            self.held = True
        except OSError:
            self.give_up()

    def give_up(self) -> None:
        """Free the space; `take` gets it back once there is some."""
        self.held = False
        with contextlib.suppress(OSError):
            self._path.unlink()
