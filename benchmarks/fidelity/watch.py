"""What disturbs a run: processors that other programs take, and processors that are not always equally quick."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field

import numpy as np
import psutil

_ROUNDS = 40  # of the probe: about 2 ms


@dataclass(slots=True)
class Watch:
    """Samples up to `times_s[i]`: processors in use by others than this process and its descendants, among those that
    it may use, and the processor time that a fixed piece of work took.
    """

    times_s: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    probe_ms: list[float] = field(default_factory=list)

    async def watch(self, period_s: float = 1.0) -> None:
        """Sample until cancelled."""
        before, own, then_s = _busy_s(), _own_s(), time.monotonic()
        while True:
            await asyncio.sleep(period_s)
            probe_s = await asyncio.to_thread(_probe_s)
            busy, now, now_s = _busy_s(), _own_s(), time.monotonic()
            ours = sum(spent - own.get(pid, 0.0) for pid, spent in now.items())
            self.times_s.append(now_s)
            self.cores.append(max(0.0, busy - before - ours) / (now_s - then_s))
            self.probe_ms.append(1e3 * probe_s)
            before, own, then_s = busy, now, now_s

    def mean_cores(self, begin_s: float, end_s: float) -> float:
        """Processors of others, mean over an interval; 0 if nothing was sampled in it."""
        return float(np.mean(self._inside(self.cores, begin_s, end_s) or [0.0]))

    def middle_probe_ms(self, begin_s: float, end_s: float) -> float:
        """Median time of the probe over an interval; 0 if nothing was sampled in it."""
        return float(np.median(self._inside(self.probe_ms, begin_s, end_s) or [0.0]))

    def _inside(self, values: list[float], begin_s: float, end_s: float) -> list[float]:
        return [value for at_s, value in zip(self.times_s, values, strict=True) if begin_s < at_s <= end_s]


def _probe_s() -> float:
    """Processor time of some products of the size that a step has."""
    rows, weights = np.full((8, 256), 0.5), np.full((256, 256), 1e-3)
    begun_s = time.thread_time()
    for _ in range(_ROUNDS):
        rows = rows @ weights
    return time.thread_time() - begun_s


def _busy_s() -> float:
    spent = psutil.cpu_times(percpu=True)
    used = [spent[number] for number in sorted(os.sched_getaffinity(0)) if number < len(spent)]
    return float(sum(one.user + one.nice + one.system + one.irq + one.softirq for one in used))


def _own_s() -> dict[int, float]:
    """Seconds by process, of this one and of everything that descends from it."""
    found = {}
    own = psutil.Process(os.getpid())
    for process in [own, *own.children(recursive=True)]:
        try:
            spent = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = float(spent.user + spent.system)
    return found
