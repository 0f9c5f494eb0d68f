"""How many instances are there over time: a Markov process fitted to traces, with losses in groups.

Loss events come at a rate for each instance that is up, additions at a constant rate below the most
that there ever are; how many go or come together has the distribution that the traces show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from data.availability import AvailabilityTrace, Change
from data.errors import InvalidInput

Matrix = npt.NDArray[np.float64]

_NOTICE_S = 30.0


@dataclass(frozen=True, slots=True)
class Process:
    """`loss_per_instance_s` and `gain_s` are events per second; the group sizes' shares sum to 1."""

    most: int
    loss_per_instance_s: float
    gain_s: float
    loss_groups: Mapping[int, float]
    gain_groups: Mapping[int, float]

    def rates(self) -> Matrix:
        """Events per second from `n` to `m` instances, [n, m]; groups are cut at nothing and at `most`."""
        table = np.zeros((self.most + 1, self.most + 1))
        for count in range(self.most + 1):
            for size, share in self.loss_groups.items():
                table[count, max(count - size, 0)] += share * count * self.loss_per_instance_s
            for size, share in self.gain_groups.items():
                if count < self.most:
                    table[count, min(count + size, self.most)] += share * self.gain_s
        np.fill_diagonal(table, 0.0)
        return table

    def hazard_s(self, count: int) -> float:
        """Changes per second while `count` instances are up."""
        return count * self.loss_per_instance_s + (self.gain_s if count < self.most else 0.0)


# SpotServe's recording of 10.6 h on g4dn.12xlarge, fitted (`process` in benchmarks/results/cpu-2-cores/spot.json).
RECORDED = Process(
    most=24,
    loss_per_instance_s=0.3539 / 3600,
    gain_s=4.593 / 3600,
    loss_groups={1: 31 / 48, 2: 12 / 48, 3: 2 / 48, 4: 2 / 48, 5: 1 / 48},
    gain_groups={1: 41 / 48, 2: 5 / 48, 3: 1 / 48, 4: 1 / 48},
)


def fit(traces: Sequence[AvailabilityTrace], most: int | None = None) -> Process:
    """Maximum likelihood from one or more traces of the same zone. Raises `InvalidInput` without any change."""
    losses, gains = Counter[int](), Counter[int]()
    up_s = below_s = 0.0
    limit = most or max(trace.most for trace in traces)
    for trace in traces:
        counts = [*trace.counts, (trace.duration_s, trace.counts[-1][1])]
        for (start, count), (end, after) in pairwise(counts):
            up_s += count * (end - start)
            below_s += (end - start) if count < limit else 0.0
            if after != count:
                (gains if after > count else losses)[abs(after - count)] += 1
    if not losses or not gains or not up_s or not below_s:
        raise InvalidInput("the traces hold no additions or no losses to fit; give longer ones")
    return Process(limit, losses.total() / up_s, gains.total() / below_s, _shares(losses), _shares(gains))


def _shares(counts: Counter[int]) -> dict[int, float]:
    return {size: number / counts.total() for size, number in sorted(counts.items())}


def fit_p_value(process: Process, traces: Sequence[AvailabilityTrace]) -> float:
    """Kolmogorov–Smirnov p-value that the changes come as the process says.

    By time rescaling the hazard summed up between two changes is exponential with mean 1
    (E. N. Brown et al., Neural Computation 14(2), 2002).
    """
    from scipy.stats import expon, kstest  # slow to import, and for this test alone

    sums = []
    for trace in traces:
        for (start, count), (end, _) in pairwise(trace.counts):
            sums.append(process.hazard_s(count) * (end - start))
    return float(kstest(sums, expon.cdf).pvalue)


def generate(process: Process, seed: int, duration_s: float, first: int) -> AvailabilityTrace:
    """A trace of the process that starts with `first` instances; who goes is drawn at random."""
    random, time_s, born = np.random.default_rng(seed), 0.0, first
    up = [f"node-{index}" for index in range(first)]
    changes = [Change(0.0, "add", tuple(up))] if up else []
    while True:
        time_s += float(random.exponential(1 / process.hazard_s(len(up))))
        if time_s >= duration_s:
            return AvailabilityTrace(f"generated {seed}", tuple(changes), duration_s)
        notice_s = min(_NOTICE_S, time_s)
        if random.random() * process.hazard_s(len(up)) < len(up) * process.loss_per_instance_s:
            size = min(_draw(random, process.loss_groups), len(up))
            gone = tuple(str(name) for name in random.choice(up, size=size, replace=False))
            up = [name for name in up if name not in gone]
            changes.append(Change(time_s, "remove", gone, notice_s))
        else:
            size = min(_draw(random, process.gain_groups), process.most - len(up))
            new = tuple(f"node-{born + index}" for index in range(size))
            born, up = born + size, [*up, *new]
            changes.append(Change(time_s, "add", new, notice_s))


def _draw(random: np.random.Generator, groups: Mapping[int, float]) -> int:
    return int(random.choice(list(groups), p=list(groups.values())))
