"""Whose turn it is on a device: that of a step, or of somebody who needs all of it for a moment."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_MOST_S = 0.05  # that anybody waits for the other: who hangs, or takes long, holds nobody up


class Turn:
    """Of one device. A step that has waited goes before whoever wants to be alone once more."""

    def __init__(self, most_s: float = _MOST_S) -> None:
        self._most_s = most_s
        self._changed = threading.Condition()
        self._stepping = self._step_waits = False
        self._alone = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """The block launches a step, once nobody is alone any more."""
        with self._changed:
            self._step_waits = True
            self._changed.wait_for(lambda: not self._alone, self._most_s)
            self._step_waits, self._stepping = False, True
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._stepping = False
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """No step is launched during the block, which begins when none is being launched; says whether that is so."""
        with self._changed:
            self._changed.wait_for(lambda: not self._step_waits, self._most_s)
            self._alone += 1
            alone = self._changed.wait_for(lambda: not self._stepping, self._most_s)
        try:
            yield alone
        finally:
            with self._changed:
                self._alone -= 1
                self._changed.notify_all()
