"""Timing code on a device: medians, spreads, and how often to repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch

MIN_REPEATS, MAX_REPEATS = 3, 15


@dataclass(frozen=True, slots=True)
class Sample:
    """Median of a series, its 90th minus 10th percentile, and its length."""

    median_ms: float
    spread_ms: float
    repeats: int

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Sample:
        """The sample of a series in seconds."""
        times_ms = np.asarray(times_s) * 1e3
        low, median, high = np.percentile(times_ms, [10, 50, 90])
        return cls(float(median), float(high - low), len(times_s))


def elapsed_s(action: Callable[[], object], device: torch.device) -> float:
    """Seconds until `action` and what it queued on the device are done."""
    settle(device)
    started = perf_counter()
    action()
    settle(device)
    return perf_counter() - started


def settle(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeats_for(share_s: float, once_s: float) -> int:
    """How often something that takes `once_s` is measured when `share_s` is there for it."""
    return int(min(MAX_REPEATS, max(MIN_REPEATS, share_s / max(once_s, 1e-6))))
