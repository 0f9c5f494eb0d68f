"""Whether what a process holds grows: a robust slope over samples, after a warm-up, against a tolerance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import theilslopes

WARM_UP = 0.2  # of all reconfigurations: caches fill, allocators find their size
MEMORY_TOLERANCE = 0.02  # of the process, over what follows the warm-up
COUNT_TOLERANCE = 1.0  # descriptors or threads over what follows: less than one that stays
_KINDS: Mapping[str, str] = {"uss_bytes": "bytes", "descriptors": "descriptors", "threads": "threads"}


@dataclass(frozen=True, slots=True)
class Sample:
    """What one process held after so many reconfigurations; memory is what only it has (USS)."""

    reconfigurations: int
    process: str
    uss_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True)
class Trend:
    """Growth of one quantity of one process over the run after its warm-up, and how much is tolerated."""

    process: str
    quantity: str
    median: float
    growth: float
    tolerance: float

    @property
    def flat(self) -> bool:
        """Whether it grows by less than is tolerated. Shrinking is no leak."""
        return self.growth < self.tolerance

    def __str__(self) -> str:
        unit = _KINDS[self.quantity]
        return f"{self.process}: {self.growth:+.0f} {unit} around {self.median:.0f} (tolerated {self.tolerance:.0f})"


def growth(at: Sequence[float], values: Sequence[float]) -> float:
    """By how much the values rise from the first to the last place: Theil–Sen slope times the distance."""
    return float(theilslopes(values, at)[0]) * (at[-1] - at[0])


def trends(samples: Iterable[Sample]) -> list[Trend]:
    """The trend of each quantity of each process, from its samples after the warm-up.

    Raises `ValueError` for a process with fewer than three of them.
    """
    taken = sorted(samples, key=lambda sample: (sample.process, sample.reconfigurations))
    last = max((sample.reconfigurations for sample in taken), default=0)
    warm = [sample for sample in taken if sample.reconfigurations > WARM_UP * last]
    return [
        _trend(process, quantity, [sample for sample in warm if sample.process == process])
        for process in dict.fromkeys(sample.process for sample in taken)
        for quantity in _KINDS
    ]


def _trend(process: str, quantity: str, samples: Sequence[Sample]) -> Trend:
    if len(samples) < 3:
        raise ValueError(f"{process} was seen {len(samples)} times after the warm-up, which says nothing of a trend")
    values = [float(getattr(sample, quantity)) for sample in samples]
    median = float(np.median(values))
    tolerance = MEMORY_TOLERANCE * median if quantity == "uss_bytes" else COUNT_TOLERANCE
    rise = growth([float(sample.reconfigurations) for sample in samples], values)
    return Trend(process, quantity, median, rise, tolerance)
