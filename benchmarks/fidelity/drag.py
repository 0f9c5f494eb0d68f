"""How quick the processors were: what a fixed piece of work took while a fleet was measured, ran, and was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from planning.step_laws import Observed

Array = npt.NDArray[np.float64]

_REACH_S = 3.0  # a probe says something about so many seconds before and after it
_VARIED = 1e-3  # sum of squares of logarithms: less says nothing
_WILD = 3.0  # no probe counts for more than so many times the one in the middle


@dataclass(frozen=True, slots=True)
class Drag:
    """By how much a probe took longer than all of them on average, at `times_s`; 1 everywhere without probes."""

    times_s: Array
    factors: Array

    @staticmethod
    def of(probes: Sequence[tuple[float, float]]) -> Drag:
        """From (time, what the probe took): means of those that are near, for a single one says little."""
        if not probes:
            return Drag(np.zeros(1), np.ones(1))
        at_s, took = np.array(sorted(probes)).T
        first, last = np.searchsorted(at_s, at_s - _REACH_S), np.searchsorted(at_s, at_s + _REACH_S)
        took = np.minimum(took, _WILD * np.median(took))
        near = np.array([np.mean(took[low:high]) for low, high in zip(first, last, strict=True)])
        return Drag(at_s, near / np.mean(took))

    def at(self, time_s: float) -> float:
        """At one moment; before the first probe and after the last as then."""
        return float(np.interp(time_s, self.times_s, self.factors))

    def felt(self, observed: Observed) -> Observed:
        """An observation with the drag of when it was made."""
        return replace(observed, drag=self.at(observed.at_s))

    def course(self, begin_s: float, end_s: float) -> list[tuple[float, float]]:
        """(Seconds after `begin_s`, factor from then on), for every second until `end_s`."""
        return [(float(second), self.at(begin_s + second + 0.5)) for second in range(int(end_s - begin_s) + 1)]


def elasticity(twice: Iterable[tuple[Observed, Observed]]) -> float:
    """How much of the drag steps feel, 0 to 1: a probe is slowed down by what works beside it, too, and not by the
    same part. From the same steps, observed twice: their logarithms' regression through the origin.
    """
    logs = [(np.log(after.drag / before.drag), np.log(after.seconds / before.seconds)) for before, after in twice]
    drags, seconds = np.array(logs, dtype=np.float64).reshape(-1, 2).T
    varied = float(drags @ drags)
    return float(np.clip(drags @ seconds / varied, 0.0, 1.0)) if varied > _VARIED else 1.0


def eased(course: Sequence[tuple[float, float]], feel: float) -> list[tuple[float, float]]:
    """The part of a run's drag that steps feel."""
    return [(time_s, factor**feel) for time_s, factor in course]


def summary(course: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Mean and extremes of the factors of a run; 1 without any."""
    factors = [factor for _, factor in course] or [1.0]
    found = {"mean": float(np.mean(factors)), "least": min(factors), "most": max(factors)}
    return {key: round(value, 3) for key, value in found.items()}
