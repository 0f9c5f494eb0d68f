"""Points in the work of a device, and whose goes first; a CPU has done everything that was asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

_FIRST = -1  # the priority of what tokens wait for; what is beside it has the device's default


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A point of this thread's current stream, to wait for; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def first(device: torch.device) -> AbstractContextManager[object]:
    """The block's kernels go before all others of this process: those of step loops, which share one stream."""
    return torch.cuda.stream(_first(device, "steps")) if device.type == "cuda" else nullcontext()


@contextmanager
def beside_steps(device: torch.device) -> Iterator[None]:
    """The block's kernels, after what this thread has asked for, are no less urgent than those of steps: they are few,
    and behind every step they would take many times as long. What follows waits for them.
    """
    if device.type != "cuda":
        yield
        return
    around, own = torch.cuda.current_stream(device), _first(device, "copies")
    own.wait_stream(around)
    try:
        with torch.cuda.stream(own):
            yield
    finally:  # what was asked for before a failure may still be under way
        around.wait_stream(own)


@cache
def _first(device: torch.device, use: str) -> torch.cuda.Stream:
    """One for each use."""
    return torch.cuda.Stream(device, priority=_FIRST)
