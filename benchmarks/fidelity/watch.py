"""What disturbs a run: processors that other programs take, and processors that are not always equally quick."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import psutil

_PERIOD_S, _PROBES = 1.0, 8  # probes of every processor in a period
_WARM_ROUNDS, _ROUNDS = 50, 100  # of a probe: about 1.5 ms
_MOST = 4  # processors that are probed: neighbours fare alike


@dataclass(slots=True)
class Watch:
    """Samples until cancelled, on the clock of `time.monotonic`.

    `cores` are (time, processors in use by others than this process and its descendants, among those that it may
    use, since the sample before), `probes` are (time, milliseconds of processor that a fixed piece of work took).
    """

    cores: list[tuple[float, float]] = field(default_factory=list)
    probes: list[tuple[float, float]] = field(default_factory=list)

    async def watch(self) -> None:
        """Sample until cancelled."""
        processors, loop = sorted(os.sched_getaffinity(0))[:_MOST], asyncio.get_running_loop()
        before, own, then_s = _busy_s(), _own_s(), time.monotonic()
        with ThreadPoolExecutor(1, "probe") as prober:
            while True:
                for _ in range(_PROBES):
                    await asyncio.sleep(_PERIOD_S / _PROBES)
                    for processor in processors:
                        took_s = await loop.run_in_executor(prober, _probe_s, processor)
                        self.probes.append((time.monotonic(), 1e3 * took_s))
                busy, now, now_s = _busy_s(), _own_s(), time.monotonic()
                ours = sum(spent - own.get(pid, 0.0) for pid, spent in now.items())
                self.cores.append((now_s, max(0.0, busy - before - ours) / (now_s - then_s)))
                before, own, then_s = busy, now, now_s

    def foreign_cores(self, *moments_s: float) -> list[float]:
        """Processors of others, mean over every interval between two moments; 0 if nothing was sampled in it."""
        return [round(float(np.mean(_inside(self.cores, *span) or [0.0])), 3) for span in pairwise(moments_s)]

    def probe_ms(self, *moments_s: float) -> list[float]:
        """Median time of the probe over every interval between two moments; 0 if nothing was sampled in it."""
        return [round(float(np.median(_inside(self.probes, *span) or [0.0])), 4) for span in pairwise(moments_s)]


def _inside(samples: list[tuple[float, float]], begin_s: float, end_s: float) -> list[float]:
    return [value for at_s, value in samples if begin_s < at_s <= end_s]


def _probe_s(processor: int) -> float:
    """Processor time of many small products: like a step, more of the interpreter than of arithmetic.

    For a thread of its own, which stays on that processor. The first rounds do not count: after a pause caches are
    cold, and the processor that a worker keeps busy has no pause.
    """
    os.sched_setaffinity(0, {processor})
    row, weights = np.full((4, 64), 0.5), np.full((64, 64), 1e-3)
    begun_s = 0.0
    for number in range(_WARM_ROUNDS + _ROUNDS):
        if number == _WARM_ROUNDS:
            begun_s = time.thread_time()
        row = row @ weights
        row = row + row.mean()
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
