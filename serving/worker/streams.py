"""Points in the work of a device, and whose goes first; a CPU has done everything that was asked of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

FIRST = -1  # the priority of what tokens wait for; what is beside it has the device's default


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A point of this thread's current stream, to wait for; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def first(device: torch.device) -> AbstractContextManager[object]:
    """The block's kernels go before all others of this process: those of step loops, which share one stream."""
    return torch.cuda.stream(_first(device)) if device.type == "cuda" else nullcontext()


@cache
def _first(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=FIRST)
