"""What one change of layout looked like to its clients: a pure function of arrivals and of the change's moments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reconfiguration.timeline import Arrivals, Timeline, gaps, longest_s, rate, step_s
from serving.requests import Event

_LEVEL = 1.2  # a service is at its level when tokens are at most this much further apart than they were
_LEVEL_STEPS = 10
_PEAK = 0.98
_PEAK_STEPS = 50
_PEAK_WINDOW_S = 0.5
_FEWEST_STEPS = 8  # a preparation that is shorter says nothing about throughput


@dataclass(frozen=True, slots=True)
class Moments:
    """When a change began, when the old layout paused, and when the new one was in force, its state in place;
    all on the clients' clock.
    """

    started_s: float
    paused_s: float
    in_force_s: float

    @classmethod
    def of(cls, events: Sequence[Event], clock_offset_s: float) -> Moments:
        """From the events of one change, `layout` being the last; `clock_offset_s` is Unix time minus the clock.

        Of several attempts the last counts.
        """
        layout = events[-1]
        started = next(event for event in reversed(events) if event.kind == "reconfiguration_started")
        seconds: Mapping[str, float] = layout.data["seconds"]
        in_force = layout.time_s - clock_offset_s
        paused = in_force - seconds["transfer"] - seconds["pause"]
        return cls(started.time_s - clock_offset_s, paused, in_force)


@dataclass(frozen=True, slots=True)
class Quiet:
    """Intervals without a change, before and after one."""

    before: tuple[float, float]
    after: tuple[float, float]


def seen(timelines: Sequence[Timeline], moments: Moments, quiet: Quiet) -> dict[str, Any]:
    """Gaps, step times, throughput while preparing, and the four clocks of a planned change.

    The gap `quiet` is the longest without any change, `longest` the longest of those around the change.
    """
    touched = [one for one in timelines if one.spans(moments.in_force_s)]
    before, after = rate(timelines, *quiet.before), rate(timelines, *quiet.after)
    preparing = rate(timelines, moments.started_s, moments.paused_s)
    steps = {"before": step_s(timelines, *quiet.before), "after": step_s(timelines, *quiet.after)}
    measurable = moments.paused_s - moments.started_s >= _FEWEST_STEPS * steps["before"]
    return {
        "requests": len(touched),
        "gap_ms": _gaps_ms(touched, moments, quiet),
        "step_ms": {name: _ms(value) for name, value in steps.items()},
        "tokens_per_s": {"before": _round(before), "preparing": _round(preparing), "after": _round(after)},
        "preparing_s": _round(moments.paused_s - moments.started_s, 4),
        "preparing_share": _round(preparing / before, 4) if measurable else None,
        "clocks_s": clocks(timelines, touched, moments.paused_s, moments.in_force_s, quiet),
    }


def _gaps_ms(touched: Sequence[Timeline], moments: Moments, quiet: Quiet) -> dict[str, float | None]:
    parts = {
        "before": (moments.started_s, moments.paused_s),
        "at": (moments.paused_s, moments.in_force_s),
        "after": (moments.in_force_s, quiet.after[1]),
    }
    longest = {name: longest_s(touched, *interval) for name, interval in parts.items()}
    # What reaches into the switch belongs to the switch; the neighbours are what is wholly outside of it.
    longest["before"] = _outside(touched, *parts["before"], moments)
    longest["after"] = _outside(touched, *parts["after"], moments)
    named = {"longest": max(longest.values()), **longest, "quiet": longest_s(touched, *quiet.before)}
    return {name: _ms(value) for name, value in named.items()}


def _outside(touched: Sequence[Timeline], since_s: float, until_s: float, moments: Moments) -> float:
    lengths = [
        gap.length_s
        for one in touched
        for gap in gaps(one, since_s, until_s)
        if gap.end_s <= moments.paused_s or gap.begin_s >= moments.in_force_s
    ]
    return max(lengths, default=0.0)


def clocks(
    timelines: Sequence[Timeline], touched: Sequence[Timeline], origin_s: float, restored_s: float, quiet: Quiet
) -> dict[str, float | None]:
    """Seconds from `origin_s` until state was restored, the first token came (of any and of the last of the touched
    requests), and level and peak of the service were back.

    They are measured against what was before, or against the new layout's own settled pace where that is
    slower: a smaller layout never gets back to the pace of a larger one. None where it did not happen in time.
    """
    arrivals = Arrivals(timelines)
    pace = min(rate(timelines, *quiet.before), rate(timelines, *quiet.after))
    step = max(step_s(timelines, *quiet.before), step_s(timelines, *quiet.after))
    firsts = [time for one in touched if (time := _first_after(one, restored_s)) is not None]
    level = peak = None
    if math.isfinite(pace) and math.isfinite(step):
        level = arrivals.back_at_s(restored_s, _LEVEL_STEPS * step, pace / _LEVEL)
        peak = arrivals.back_at_s(restored_s, max(_PEAK_WINDOW_S, _PEAK_STEPS * step), _PEAK * pace)
    moments = {
        "state_restored": restored_s,
        "first_token": min(firsts, default=None),
        "first_token_of_all": max(firsts) if firsts and len(firsts) == len(touched) else None,
        "service_level": level,
        "peak_throughput": peak,
    }
    return {name: None if at is None else _round(at - origin_s, 4) for name, at in moments.items()}


def _first_after(timeline: Timeline, time_s: float) -> float | None:
    return next((time for time in timeline.times_s if time > time_s), None)


def _ms(value_s: float) -> float | None:
    return _round(1e3 * value_s)


def _round(value: float, digits: int = 2) -> float | None:
    return round(value, digits) if math.isfinite(value) else None
