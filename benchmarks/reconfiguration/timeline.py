"""What the arrival times of tokens say: gaps, rates, and when a service is itself again. Pure functions.

Times are seconds on one monotonic clock. Arrivals are messages; each brings one token or more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


@dataclass(slots=True)
class Timeline:
    """One request as its client saw it: the i-th message came at `times_s[i]` with `counts[i]` tokens,
    the first of them at output position `indices[i]`.
    """

    request_id: str
    prompt_tokens: int = 0
    times_s: list[float] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    ended: bool = False

    def note(self, time_s: float, index: int, count: int) -> None:
        """A message arrived."""
        self.times_s.append(time_s)
        self.indices.append(index)
        self.counts.append(count)

    @property
    def tokens(self) -> int:
        """Output tokens so far."""
        return sum(self.counts)

    def tokens_by(self, time_s: float) -> int:
        """Output tokens that had arrived by then."""
        return sum(self.counts[: int(np.searchsorted(self.times_s, time_s, side="right"))])

    def spans(self, time_s: float) -> bool:
        """Whether the request had begun by then and went on, or may go on, afterwards."""
        return bool(self.times_s) and self.times_s[0] <= time_s and (not self.ended or self.times_s[-1] > time_s)


@dataclass(frozen=True, slots=True)
class Gap:
    """The time between two messages of one request."""

    begin_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """How long nothing came."""
        return self.end_s - self.begin_s


def gaps(timeline: Timeline, since_s: float, until_s: float) -> list[Gap]:
    """Gaps that reach into the open interval."""
    times = np.asarray(timeline.times_s)
    chosen = np.flatnonzero((times[1:] > since_s) & (times[:-1] < until_s)) if len(times) > 1 else ()
    return [Gap(float(times[index]), float(times[index + 1])) for index in chosen]


def longest(timelines: Iterable[Timeline], since_s: float, until_s: float) -> Gap | None:
    """The longest gap of any request that reaches into the interval."""
    found = (gap for one in timelines for gap in gaps(one, since_s, until_s))
    return max(found, key=lambda gap: gap.length_s, default=None)


def longest_s(timelines: Iterable[Timeline], since_s: float, until_s: float) -> float:
    """How long that is; 0 if there is none."""
    gap = longest(timelines, since_s, until_s)
    return gap.length_s if gap else 0.0


def stall_s(timeline: Timeline, since_s: float, until_s: float) -> float:
    """The longest gap that reaches into the interval, also one that is still open at its end."""
    waiting = bool(timeline.times_s) and not timeline.ended and timeline.times_s[-1] < until_s
    return max(longest_s([timeline], since_s, until_s), until_s - timeline.times_s[-1] if waiting else 0.0)


def step_s(timelines: Iterable[Timeline], since_s: float, until_s: float) -> float:
    """Median time from token to token inside the interval; NaN if nothing came."""
    values: list[Times] = []
    for one in timelines:
        times, counts = np.asarray(one.times_s), np.asarray(one.counts)
        inside = np.flatnonzero((times[1:] <= until_s) & (times[:-1] >= since_s)) if len(times) > 1 else ()
        values += [np.full(counts[i + 1], (times[i + 1] - times[i]) / counts[i + 1]) for i in inside]
    return float(np.median(np.concatenate(values))) if values else float("nan")


def rate(timelines: Iterable[Timeline], since_s: float, until_s: float) -> float:
    """Tokens per second in an interval, all requests together; NaN if nothing came.

    Of a request that runs throughout, whole steps are counted: from its last message by `since_s` to its last by
    `until_s`, so that an interval of few steps is not off by a part of one. A stall at the end is not seen.
    """
    found = [value for one in timelines if (value := _rate(one, since_s, until_s)) is not None]
    return sum(found) if found else float("nan")


def _rate(timeline: Timeline, since_s: float, until_s: float) -> float | None:
    times = np.asarray(timeline.times_s)
    first, last = (int(np.searchsorted(times, at, side="right")) - 1 for at in (since_s, until_s))
    if last <= first:
        return None
    count = sum(timeline.counts[first + 1 : last + 1])
    throughout = first >= 0 and not (timeline.ended and last == len(times) - 1)
    return count / float(times[last] - times[first] if throughout else until_s - since_s)


class Arrivals:
    """All tokens of some requests in the order in which they came."""

    def __init__(self, timelines: Iterable[Timeline]) -> None:
        kept = [one for one in timelines if one.times_s]
        times = np.concatenate([np.asarray(one.times_s) for one in kept]) if kept else np.zeros(0)
        counts = np.concatenate([np.asarray(one.counts) for one in kept]) if kept else np.zeros(0, dtype=np.int64)
        order = np.argsort(times, kind="stable")
        self._times: Times = times[order]
        self._total = np.concatenate([[0], np.cumsum(counts[order])])

    def back_at_s(self, since_s: float, window_s: float, least_rate: float) -> float | None:
        """When a whole window begins in which tokens come at `least_rate` or faster; None if none does.

        A window goes from one arrival to the first that is `window_s` later.
        """
        begins = np.flatnonzero(self._times >= since_s)
        ends = np.searchsorted(self._times, self._times[begins] + window_s, side="left")
        known = ends < len(self._times)
        begins, ends = begins[known], ends[known]
        rates = (self._total[ends + 1] - self._total[begins + 1]) / np.maximum(
            self._times[ends] - self._times[begins], 1e-9
        )
        enough = np.flatnonzero(rates >= least_rate)
        return float(self._times[begins[enough[0]]]) if len(enough) else None


def continuity(timelines: Iterable[Timeline]) -> tuple[int, int]:
    """Tokens that are missing between messages, and tokens that came twice."""
    lost = duplicated = 0
    for one in timelines:
        due = 0
        for index, count in zip(one.indices, one.counts, strict=True):
            lost += max(0, index - due)
            duplicated += max(0, due - index)
            due = max(due, index + count)
    return lost, duplicated


def quantiles_ms(values_s: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum in milliseconds; nothing of nothing."""
    if not values_s:
        return {}
    median, p99, most = np.percentile(np.asarray(values_s) * 1e3, [50, 99, 100])
    return {"p50": round(float(median), 2), "p99": round(float(p99), 2), "max": round(float(most), 2)}
