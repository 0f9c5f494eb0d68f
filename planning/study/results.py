"""What is kept of a simulation: its latencies and costs as numbers, over time, and change by change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from planning.simulation.serving import Outcome

Array = npt.NDArray[np.float64]

BINS = 60
_CONFIDENCE = 0.975  # two-sided 95 %


@dataclass(frozen=True, slots=True)
class Result:
    """One simulation of `policy` on `trace`: latencies over all requests, and what it cost and moved.

    `over_time` is (seconds, mean latency of the requests that arrived around then); `changes` are
    (seconds, length of the pause, GB moved).
    """

    trace: str
    policy: str
    seed: int
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    requests: int
    unfinished: int
    usd: float
    moved_gb: float
    longest_pause_s: float
    over_time: Sequence[tuple[float, float]] = ()
    changes: Sequence[tuple[float, float, float]] = ()

    @classmethod
    def of(cls, trace: str, policy: str, seed: int, outcome: Outcome) -> Result:
        """The numbers of an outcome."""
        found = outcome.summary()
        return cls(
            trace,
            policy,
            seed,
            found.mean_s,
            found.p50_s,
            found.p90_s,
            found.p99_s,
            found.requests,
            found.unfinished,
            outcome.usd,
            sum(one.moved_bytes for one in outcome.transitions) / 1e9,
            longest_pause_s(outcome),
            over_time(outcome),
            [(one.time_s, one.ready_s - one.stop_s, one.moved_bytes / 1e9) for one in outcome.transitions],
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        """Inverse of `dataclasses.asdict`, also after JSON."""
        pairs = {key: [tuple(row) for row in value[key]] for key in ("over_time", "changes")}
        return cls(**{**value, **pairs})


@dataclass(frozen=True, slots=True)
class Pooled:
    """The means of a policy's results over the seeds of one trace; `interval_s` is the 95 % one of the P99's mean."""

    trace: str
    policy: str
    seeds: int
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    interval_s: tuple[float, float]
    requests: float
    unfinished: float
    usd: float
    moved_gb: float
    longest_pause_s: float


def pooled(results: Sequence[Result]) -> Pooled:
    """Means over the seeds of one policy on one trace; the longest pause is that of all."""
    first, means = results[0], {
        name: float(np.mean([getattr(one, name) for one in results]))
        for name in ("mean_s", "p50_s", "p90_s", "p99_s", "requests", "unfinished", "usd", "moved_gb")
    }  # fmt: skip
    return Pooled(
        first.trace,
        first.policy,
        len(results),
        interval_s=mean_interval([one.p99_s for one in results]),
        longest_pause_s=max(one.longest_pause_s for one in results),
        **means,
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t; without a spread to estimate it from, the mean itself."""
    middle = float(np.mean(values))
    if len(values) < 2 or not np.isfinite(values).all():
        return middle, middle
    from scipy.stats import t as student  # slow to import, and for this alone

    half = float(student.ppf(_CONFIDENCE, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return middle - half, middle + half


def longest_pause_s(outcome: Outcome) -> float:
    """From a stop to the next start, at most."""
    return max((one.ready_s - one.stop_s for one in outcome.transitions), default=0.0)


def over_time(outcome: Outcome, bins: int = BINS) -> list[tuple[float, float]]:
    """(middle of a bin, mean latency of its arrivals), without bins that hold none."""
    edges = np.linspace(0.0, outcome.duration_s, bins + 1)
    place = np.digitize(outcome.arrival_s, edges) - 1
    return [
        (float(edges[index : index + 2].mean()), float(outcome.latency_s[place == index].mean()))
        for index in range(bins)
        if (place == index).any()
    ]


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (dollars, seconds) that no other point beats in both, by dollars."""
    kept, best = [], inf
    for usd, seconds in sorted(points):
        if seconds < best:
            best = seconds
            kept.append((usd, seconds))
    return kept


def finite(value: Any) -> Any:
    """A JSON value without infinities, which JSON has not: what never happens is None."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value
