"""Streams of a GPU that nobody else here has.

The framework hands out the same 32 of each priority again and again, NCCL's (of the default priority) among them. Two
users of one wait for each other, and what one launches while the other records ends up in the recording.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import torch

_idle: defaultdict[tuple[torch.device, int], list[torch.cuda.Stream]] = defaultdict(list)


def own_stream(owner: object, device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    """A stream for as long as `owner` lives; then it serves the next one."""
    idle = _idle[device, priority]
    try:
        stream = idle.pop()
    except IndexError:
        stream = torch.cuda.Stream(device, priority=priority)
    weakref.finalize(owner, idle.append, stream).atexit = False
    return stream
