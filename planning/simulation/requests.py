"""Whole requests on groups of devices: one number per stage and group is all the state there is.

AlpaServe's fast simulator (Li et al., OSDI 2023), which its planner searches with. Requests are taken in order of
arrival, each exactly once. Of the groups that hold the model, the one whose last stage is free first gets it (the
lowest index on ties; the clock is not clamped to the present). Stage by stage t = max(t, clock) + stage time. If
t + 11 ms - arrival is within the SLO, the clocks move on; otherwise the request is rejected and leaves no trace.
A request of a model that no group holds is rejected. All arithmetic on times is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.placement import Arrivals, Placement, Schedule
from planning.simulation.compiled import compiled
from planning.simulation.tables import Floats, Ints, Tables

OVERHEAD_S = 0.011
"""What every request takes besides its stages."""
TRIM_S = 10.0
"""Seconds at both ends of a trace that a reported attainment leaves out."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Outcome:
    """Response time of every request (-1 if rejected) and the group it was sent to (-1 if nobody holds the model)."""

    response_s: Floats
    group: Ints

    @property
    def good(self) -> npt.NDArray[np.bool_]:
        """Which requests met their SLO."""
        return self.response_s >= 0

    def attainment(self, arrivals: Arrivals, trim_s: float = TRIM_S) -> float:
        """Share of requests that met their SLO, without those at both ends. NaN if none is left."""
        begin, end = arrivals.trimmed(trim_s)
        return float(np.mean(self.good[begin:end])) if end > begin else float("nan")

    @property
    def mean_latency_s(self) -> float:
        """Mean response time, a rejected request counting as 0, as AlpaServe has it."""
        return float(np.where(self.good, self.response_s, 0.0).mean())


@compiled
def earliest(busy: Ints, holders: Ints, begin: int, end: int) -> int:
    """Position in `holders[begin:end]` of the group that is free first; the lowest on ties.

    `busy` are the bits of the last stage's clocks: for numbers >= 0 they order as the numbers do, and comparing
    integers is quicker than comparing floats.
    """
    pick = begin
    soonest = busy[holders[begin]]
    for position in range(begin + 1, end):
        clock = busy[holders[position]]
        pick = position if clock < soonest else pick
        soonest = clock if clock < soonest else soonest
    return pick


@compiled
def _one_stage(now: float, limit_s: float, clock: Floats, group: int, stage_s: Floats, row: int) -> float:
    end = max(now, clock[group, 0]) + stage_s[row, 0]
    took_s: float = end + OVERHEAD_S - now
    if took_s <= limit_s:
        clock[group, 0] = end
        return took_s
    return -1.0


@compiled
def _two_stages(now: float, limit_s: float, clock: Floats, group: int, stage_s: Floats, row: int) -> float:
    first = max(now, clock[group, 0]) + stage_s[row, 0]
    end = max(first, clock[group, 1]) + stage_s[row, 1]
    took_s: float = end + OVERHEAD_S - now
    if took_s <= limit_s:
        clock[group, 0], clock[group, 1] = first, end
        return took_s
    return -1.0


@compiled
def _four_stages(now: float, limit_s: float, clock: Floats, group: int, stage_s: Floats, row: int) -> float:
    a = max(now, clock[group, 0]) + stage_s[row, 0]
    b = max(a, clock[group, 1]) + stage_s[row, 1]
    c = max(b, clock[group, 2]) + stage_s[row, 2]
    end = max(c, clock[group, 3]) + stage_s[row, 3]
    took_s: float = end + OVERHEAD_S - now
    if took_s <= limit_s:
        clock[group, 0], clock[group, 1], clock[group, 2], clock[group, 3] = a, b, c, end
        return took_s
    return -1.0


@compiled
def _eight_stages(now: float, limit_s: float, clock: Floats, group: int, stage_s: Floats, row: int) -> float:
    a = max(now, clock[group, 0]) + stage_s[row, 0]
    b = max(a, clock[group, 1]) + stage_s[row, 1]
    c = max(b, clock[group, 2]) + stage_s[row, 2]
    d = max(c, clock[group, 3]) + stage_s[row, 3]
    e = max(d, clock[group, 4]) + stage_s[row, 4]
    f = max(e, clock[group, 5]) + stage_s[row, 5]
    g = max(f, clock[group, 6]) + stage_s[row, 6]
    end = max(g, clock[group, 7]) + stage_s[row, 7]
    took_s: float = end + OVERHEAD_S - now
    if took_s <= limit_s:
        clock[group, 0], clock[group, 1], clock[group, 2], clock[group, 3] = a, b, c, d
        clock[group, 4], clock[group, 5], clock[group, 6], clock[group, 7] = e, f, g, end
        return took_s
    return -1.0


@compiled
def _any_stages(now: float, limit_s: float, clock: Floats, group: int, stage_s: Floats, row: int, depth: int) -> float:
    end = now
    for stage in range(depth):
        end = max(end, clock[group, stage]) + stage_s[row, stage]
    took_s: float = end + OVERHEAD_S - now
    if took_s > limit_s:
        return -1.0
    end = now
    for stage in range(depth):
        end = max(end, clock[group, stage]) + stage_s[row, stage]
        clock[group, stage] = end
    return took_s


@compiled
def serve(
    now: float, limit_s: float, clock: Floats, last: Floats, group: int, stage_s: Floats, row: int, depth: int
) -> float:
    """Seconds to the response, with the group's clocks moved on; -1 if that is later than `limit_s` allows.

    The test up front is exact: a finish is never before the last stage's clock plus its time, and rounding keeps order.
    """
    if last[group] + stage_s[row, depth - 1] + OVERHEAD_S - now > limit_s:
        return -1.0
    if depth == 1:
        took_s = _one_stage(now, limit_s, clock, group, stage_s, row)
    elif depth == 4:
        took_s = _four_stages(now, limit_s, clock, group, stage_s, row)
    elif depth == 8:
        took_s = _eight_stages(now, limit_s, clock, group, stage_s, row)
    elif depth == 2:
        took_s = _two_stages(now, limit_s, clock, group, stage_s, row)
    else:
        took_s = _any_stages(now, limit_s, clock, group, stage_s, row, depth)
    if took_s >= 0.0:
        last[group] = clock[group, depth - 1]
    return took_s


@compiled
def holders_of(shape: Ints, members: Bytes, rows: Ints, begin: Ints, holders: Ints, holder_rows: Ints) -> None:
    """Who holds what, model by model: `holders[begin[m]:begin[m + 1]]` ascending, and their rows of stage times."""
    count = 0
    for model in range(members.shape[1]):
        begin[model] = count
        for group in range(members.shape[0]):
            if members[group, model]:
                holders[count] = group
                holder_rows[count] = rows[model, shape[group]]
                count += 1
    begin[members.shape[1]] = count


@compiled
def _replay(
    times_s: Floats, models: npt.NDArray[np.int32], slo_s: Floats, depth: Ints, begin: Ints, holders: Ints,
    holder_rows: Ints, stage_s: Floats, clock: Floats, last: Floats, busy: Ints, response_s: Floats, sent: Ints
) -> None:  # fmt: skip
    for request in range(times_s.shape[0]):
        model = models[request]
        first, end = begin[model], begin[model + 1]
        response_s[request] = -1.0
        sent[request] = -1
        if first < end:
            pick = earliest(busy, holders, first, end)
            group = holders[pick]
            sent[request] = group
            response_s[request] = serve(
                times_s[request], slo_s[model], clock, last, group, stage_s, holder_rows[pick], depth[group]
            )


class Replay:
    """One placement made ready to be replayed on any number of traces."""

    def __init__(self, tables: Tables, placement: Placement) -> None:
        shape, members = tables.membership(placement.groups)
        self._begin = np.zeros(members.shape[1] + 1, dtype=np.int64)
        self._holders = np.zeros(int(members.sum()), dtype=np.int64)
        self._holder_rows = np.zeros_like(self._holders)
        holders_of(shape, members, tables.rows(), self._begin, self._holders, self._holder_rows)
        self._depth, self._stage_s, self._slo_s = tables.depth[shape], tables.stage_s, tables.slo_s

    def run(self, arrivals: Arrivals) -> Outcome:
        """What becomes of every request, from idle groups on."""
        clock = np.zeros((len(self._depth), self._stage_s.shape[1]))
        last = np.zeros(len(self._depth))
        outcome = Outcome(np.empty(len(arrivals)), np.empty(len(arrivals), dtype=np.int64))
        _replay(
            arrivals.times_s, arrivals.models, self._slo_s, self._depth, self._begin, self._holders, self._holder_rows,
            self._stage_s, clock, last, last.view(np.int64), outcome.response_s, outcome.group,
        )  # fmt: skip
        return outcome


def replay(tables: Tables, plan: Placement | Schedule, arrivals: Arrivals) -> Outcome:
    """What becomes of every request of the trace.

    A schedule switches at the first arrival after a start time, at most once per request; that request is served by
    the new placement, whose groups are idle. Switching costs nothing.
    """
    if isinstance(plan, Placement):
        return Replay(tables, plan).run(arrivals)
    cuts = [0, *_switches(plan.starts_s, arrivals.times_s), len(arrivals)]
    parts = [
        replay(tables, placement, arrivals.part(begin, end))
        for placement, begin, end in zip(plan.placements, cuts, cuts[1:], strict=False)
    ]
    return Outcome(np.concatenate([p.response_s for p in parts]), np.concatenate([p.group for p in parts]))


def _switches(starts_s: tuple[float, ...], times_s: Floats) -> list[int]:
    switches: list[int] = []
    for start_s in starts_s[1:]:
        after = int(np.searchsorted(times_s, start_s, side="right"))
        switches.append(min(max(after, switches[-1] + 1 if switches else 0), len(times_s)))
    return switches
