"""Lets go of what a worker is done with, where nobody waits for it."""

from __future__ import annotations

import threading
from typing import Any

from serving.worker.replica import StepLoop

_BROKEN_S = 1.0  # in which others may read what a broken replica left, undisturbed
_HUNG_S = 0.03  # a step that is not over so long after it was broken waits for a lost peer, unless it is a long one


def clear_aside(things: list[Any]) -> None:
    """Destroy what only this list holds, in a thread of its own: taking NCCL down is slow, and so are recordings."""
    threading.Thread(target=_clear, args=(things,), name="clear", daemon=True).start()


class BrokenLoops:
    """Loops of broken replicas, which were set aside, until their groups are aborted.

    While NCCL takes a communicator down nothing else gets at the device. Others want to read the caches there now, so
    that comes a little later, or when this device is to compute again; but at once if the device waits for a
    lost peer, because then nobody reads anything. Safe to use from any thread.
    """

    def __init__(self, *, on_gpu: bool) -> None:
        self._looks = ((_HUNG_S, True), (_BROKEN_S, False)) if on_gpu else ((0.0, False),)
        self._loops: list[StepLoop] = []
        self._lock = threading.Lock()

    def add(self, loop: StepLoop) -> None:
        """Abort it later."""
        with self._lock:
            self._loops.append(loop)
        for after_s, hung_only in self._looks:
            later = threading.Timer(after_s, self._end, [loop], {"hung_only": hung_only})
            later.daemon = True
            later.start()

    def end_all(self) -> None:
        """Abort all of them now."""
        with self._lock:
            loops = list(self._loops)
        for loop in loops:
            self._end(loop)

    def _end(self, loop: StepLoop, *, hung_only: bool = False) -> None:
        if hung_only and loop.position.at_rest:
            return
        with self._lock:
            if loop not in self._loops:
                return
            self._loops.remove(loop)
        loop.position.abort()
        clear_aside([loop])


def _clear(things: list[Any]) -> None:
    while things:
        thing = things.pop()
        if isinstance(thing, StepLoop) and not thing.is_alive():
            for part in thing.position.parts:
                part.model.close()
