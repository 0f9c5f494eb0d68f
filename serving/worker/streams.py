"""Points in the work of a device; a CPU has done everything that was asked of it."""

from __future__ import annotations

import torch


def mark(device: torch.device) -> torch.cuda.Event | None:
    """A point of this thread's current stream, to wait for; None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
