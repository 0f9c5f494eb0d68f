"""What other programs take of the processors meanwhile: a run on a busy machine says little."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field

import psutil


@dataclass(slots=True)
class Foreign:
    """Processors in use by others than this process and its descendants, sampled; `cores[i]` up to `times_s[i]`."""

    times_s: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)

    async def watch(self, period_s: float = 1.0) -> None:
        """Sample until cancelled."""
        before, own, then_s = _busy_s(), _own_s(), time.monotonic()
        while True:
            await asyncio.sleep(period_s)
            busy, now, now_s = _busy_s(), _own_s(), time.monotonic()
            ours = sum(spent - own.get(pid, 0.0) for pid, spent in now.items())
            self.times_s.append(now_s)
            self.cores.append(max(0.0, busy - before - ours) / (now_s - then_s))
            before, own, then_s = busy, now, now_s

    def mean(self, begin_s: float, end_s: float) -> float:
        """Mean over an interval, 0 if nothing was sampled in it."""
        inside = [cores for time_s, cores in zip(self.times_s, self.cores, strict=True) if begin_s < time_s <= end_s]
        return sum(inside) / len(inside) if inside else 0.0


def _busy_s() -> float:
    spent = psutil.cpu_times()
    return float(spent.user + spent.nice + spent.system + spent.irq + spent.softirq)


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
