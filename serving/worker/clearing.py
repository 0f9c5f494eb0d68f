"""Lets go of what a worker is done with, where nobody waits for it."""

from __future__ import annotations

import threading
from typing import Any

from serving.worker.replica import StepLoop


def clear_aside(things: list[Any]) -> None:
    """Destroy what only this list holds, in a thread of its own: taking NCCL down is slow, and so are recordings."""
    threading.Thread(target=_clear, args=(things,), name="clear", daemon=True).start()


def _clear(things: list[Any]) -> None:
    while things:
        thing = things.pop()
        if isinstance(thing, StepLoop) and not thing.is_alive():
            for part in thing.position.parts:
                part.model.close()
