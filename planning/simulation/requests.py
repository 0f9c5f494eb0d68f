"""Whole requests on groups of devices: one number per stage and group is all the state there is.

AlpaServe's fast simulator (Li et al., OSDI 2023), which its planner searches with. Requests are taken in order of
arrival, each exactly once. Of the groups that hold the model, the one whose last stage is free first gets it (the
lowest index on ties; the clock is not clamped to the present). Stage by stage t = max(t, clock) + stage time. If
t + 11 ms - arrival is within the SLO, the clocks move on; otherwise the request is rejected and leaves no trace.
A request of a model that no group holds is rejected. All arithmetic on times is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.placement import Arrivals, Placement, Schedule
from planning.simulation.compiled import compiled, inlined
from planning.simulation.tables import SHORT_STAGES, Floats, Ints, Tables

OVERHEAD_S = 0.011
"""What every request takes besides its stages."""
TRIM_S = 10.0
"""Seconds at both ends of a trace that a reported attainment leaves out."""

Serve = Callable[[float, float, Floats, int, Floats, int], float]
Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.uint32]  # unsigned: the compiler need not look for negative indices


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


@inlined
def earliest(busy: Ints, holders: Indices, begin: int, end: int) -> int:
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
def serve_single(now: float, limit_s: float, clock: Floats, group: int, stage_s: Floats, row: int) -> float:
    """`serve_deep` for groups of one stage."""
    end = max(now, clock[group, 0]) + stage_s[row, 0]
    took_s: float = end + OVERHEAD_S - now
    if took_s > limit_s:
        return -1.0
    clock[group, 0] = end
    return took_s


@compiled
def serve_short(now: float, limit_s: float, clock: Floats, group: int, stage_s: Floats, row: int) -> float:
    """`serve_deep` for up to eight stages: those that a group lacks take no time, and so leave the finish as it is."""
    a = max(now, clock[group, 0]) + stage_s[row, 0]
    b = max(a, clock[group, 1]) + stage_s[row, 1]
    c = max(b, clock[group, 2]) + stage_s[row, 2]
    d = max(c, clock[group, 3]) + stage_s[row, 3]
    e = max(d, clock[group, 4]) + stage_s[row, 4]
    f = max(e, clock[group, 5]) + stage_s[row, 5]
    g = max(f, clock[group, 6]) + stage_s[row, 6]
    end = max(g, clock[group, 7]) + stage_s[row, 7]
    took_s: float = end + OVERHEAD_S - now
    if took_s > limit_s:
        return -1.0
    clock[group, 0], clock[group, 1], clock[group, 2], clock[group, 3] = a, b, c, d
    clock[group, 4], clock[group, 5], clock[group, 6], clock[group, 7] = e, f, g, end
    return took_s


@compiled
def serve_deep(now: float, limit_s: float, clock: Floats, group: int, stage_s: Floats, row: int) -> float:
    """Seconds to the response, with the group's clocks moved on; -1, and no change, if that is more than `limit_s`."""
    end = now
    for stage in range(stage_s.shape[1]):
        end = max(end, clock[group, stage]) + stage_s[row, stage]
    took_s: float = end + OVERHEAD_S - now
    if took_s > limit_s:
        return -1.0
    end = now
    for stage in range(stage_s.shape[1]):
        end = max(end, clock[group, stage]) + stage_s[row, stage]
        clock[group, stage] = end
    return took_s


@compiled
def holders_of(shape: Ints, members: Bytes, rows: Ints, begin: Indices, holders: Indices, holder_rows: Indices) -> None:
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


@inlined
def _replay(
    serve: Serve, times_s: Floats, models: Indices, slo_s: Floats, begin: Indices, holders: Indices,
    holder_rows: Indices, stage_s: Floats, clock: Floats, last: Floats, busy: Ints, response_s: Floats, sent: Ints
) -> None:  # fmt: skip
    final = clock.shape[1] - 1
    for request in range(times_s.shape[0]):
        model = models[request]
        first, end = begin[model], begin[model + 1]
        took_s, target = -1.0, -1
        if first < end:
            pick = earliest(busy, holders, first, end)
            group = holders[pick]
            target = group
            took_s = serve(times_s[request], slo_s[model], clock, group, stage_s, holder_rows[pick])
            if took_s >= 0.0:
                last[group] = clock[group, final]
        response_s[request] = took_s
        sent[request] = target


@compiled
def _replay_short(
    times_s: Floats, models: Indices, slo_s: Floats, begin: Indices, holders: Indices, holder_rows: Indices,
    stage_s: Floats, clock: Floats, last: Floats, busy: Ints, response_s: Floats, sent: Ints
) -> None:  # fmt: skip
    _replay(
        serve_short, times_s, models, slo_s, begin, holders, holder_rows, stage_s, clock, last, busy, response_s, sent
    )  # fmt: skip


@compiled
def _replay_deep(
    times_s: Floats, models: Indices, slo_s: Floats, begin: Indices, holders: Indices, holder_rows: Indices,
    stage_s: Floats, clock: Floats, last: Floats, busy: Ints, response_s: Floats, sent: Ints
) -> None:  # fmt: skip
    _replay(
        serve_deep, times_s, models, slo_s, begin, holders, holder_rows, stage_s, clock, last, busy, response_s, sent
    )  # fmt: skip


class Replay:
    """One placement made ready to be replayed on any number of traces."""

    def __init__(self, tables: Tables, placement: Placement) -> None:
        shape, members = tables.membership(placement.groups)
        self._groups = len(shape)
        self._begin = np.zeros(members.shape[1] + 1, dtype=np.uint32)
        self._holders = np.zeros(int(members.sum()), dtype=np.uint32)
        self._holder_rows = np.zeros_like(self._holders)
        holders_of(shape, members, tables.rows(), self._begin, self._holders, self._holder_rows)
        self._stage_s, self._slo_s = tables.stage_s, tables.slo_s

    def run(self, arrivals: Arrivals) -> Outcome:
        """What becomes of every request, from idle groups on."""
        clock, last = np.zeros((self._groups, self._stage_s.shape[1])), np.zeros(self._groups)
        outcome = Outcome(np.empty(len(arrivals)), np.empty(len(arrivals), dtype=np.int64))
        kernel = _replay_short if clock.shape[1] == SHORT_STAGES else _replay_deep
        kernel(
            arrivals.times_s, arrivals.models.view(np.uint32), self._slo_s, self._begin, self._holders,
            self._holder_rows, self._stage_s, clock, last, last.view(np.int64), outcome.response_s, outcome.group,
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
