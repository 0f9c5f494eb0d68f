"""Whole requests under the serving tier's rule: earliest deadline first, and no rejection while some replica can.

A request is offered to the groups that hold its model, the one that would finish it first to begin with. A group takes
it if all that it has taken and not begun, in order of deadline, then still meets its SLO; only if no group can is the
request rejected. A group begins the request of earliest deadline whenever its first stage is free; stages further on
keep the order. Stage times and overhead are those of the fast simulator, so that only the rule differs.
"""

from __future__ import annotations

import numpy as np

from data.placement import Arrivals, Placement
from planning.simulation.compiled import compiled
from planning.simulation.requests import OVERHEAD_S, Indices, Outcome, holders_of
from planning.simulation.tables import Floats, Ints, Tables

_QUEUE = 512  # requests that a group may have taken and not begun


@compiled
def _advance(
    now: float, group: int, clock: Floats, stage_s: Floats, waiting: Ints, due_s: Floats, rows: Ints, asks: Ints,
    finish_s: Floats
) -> None:  # fmt: skip
    """Begin what the first stage is free for before `now`; the queue is in order of deadline."""
    while waiting[group] and clock[group, 0] <= now:
        _begin(group, clock, stage_s, rows[group, 0], asks[group, 0], finish_s)
        waiting[group] -= 1
        for place in range(waiting[group]):
            due_s[group, place] = due_s[group, place + 1]
            rows[group, place] = rows[group, place + 1]
            asks[group, place] = asks[group, place + 1]


@compiled
def _begin(group: int, clock: Floats, stage_s: Floats, row: int, request: int, finish_s: Floats) -> None:
    end = -np.inf
    for stage in range(clock.shape[1]):
        end = max(end, clock[group, stage]) + stage_s[row, stage]
        clock[group, stage] = end
    finish_s[request] = end


@compiled
def _finish_if_taken(
    group: int, ready: Floats, clock: Floats, stage_s: Floats, waiting: int, due_s: Floats, rows: Ints, row: int,
    due: float
) -> float:  # fmt: skip
    """When the group would finish the request; infinite if then it or another would be late."""
    ready[:] = clock[group]
    mine = np.inf
    placed = False
    for place in range(waiting + 1):
        is_mine = not placed and (place == waiting or due < due_s[group, place])
        other = place - 1 if placed else place
        used = row if is_mine else rows[group, other]
        limit = due if is_mine else due_s[group, other]
        end = -np.inf
        for stage in range(ready.shape[0]):
            end = max(end, ready[stage]) + stage_s[used, stage]
            ready[stage] = end
        if end + OVERHEAD_S > limit:
            return np.inf
        if is_mine:
            mine, placed = end, True
    return mine


@compiled
def _take(group: int, waiting: Ints, due_s: Floats, rows: Ints, asks: Ints, due: float, row: int, request: int) -> None:
    place = waiting[group]
    while place and due < due_s[group, place - 1]:
        due_s[group, place] = due_s[group, place - 1]
        rows[group, place] = rows[group, place - 1]
        asks[group, place] = asks[group, place - 1]
        place -= 1
    due_s[group, place], rows[group, place], asks[group, place] = due, row, request
    waiting[group] += 1


@compiled
def _serve_all(
    times_s: Floats, models: Indices, slo_s: Floats, begin: Indices, holders: Indices, holder_rows: Indices,
    stage_s: Floats, groups: int, finish_s: Floats, sent: Ints
) -> None:  # fmt: skip
    clock = np.zeros((groups, stage_s.shape[1]))
    ready = np.zeros(stage_s.shape[1])
    waiting = np.zeros(groups, dtype=np.int64)
    due_s = np.zeros((groups, _QUEUE))
    rows, asks = np.zeros((groups, _QUEUE), dtype=np.int64), np.zeros((groups, _QUEUE), dtype=np.int64)
    for request in range(times_s.shape[0]):
        now, model = times_s[request], models[request]
        due = now + slo_s[model]
        best, first, best_row = np.inf, -1, 0
        for position in range(begin[model], begin[model + 1]):
            group, row = int(holders[position]), int(holder_rows[position])
            _advance(now, group, clock, stage_s, waiting, due_s, rows, asks, finish_s)
            if waiting[group] == 0:
                clock[group, 0] = max(clock[group, 0], now)
            if waiting[group] < _QUEUE - 1:
                end = _finish_if_taken(group, ready, clock, stage_s, waiting[group], due_s, rows, row, due)
                if end < best:
                    best, first, best_row = end, group, row
        sent[request] = first
        if first >= 0:
            _take(first, waiting, due_s, rows, asks, due, best_row, request)
    for group in range(groups):
        _advance(np.inf, group, clock, stage_s, waiting, due_s, rows, asks, finish_s)


def serving_replay(tables: Tables, placement: Placement, arrivals: Arrivals) -> Outcome:
    """What becomes of every request; `group` is -1 for the rejected, too."""
    shape, members = tables.membership(placement.groups)
    begin = np.zeros(members.shape[1] + 1, dtype=np.uint32)
    holders = np.zeros(int(members.sum()), dtype=np.uint32)
    rows = np.zeros_like(holders)
    holders_of(shape, members, tables.rows(), begin, holders, rows)
    finish_s = np.full(len(arrivals), -np.inf)
    sent = np.full(len(arrivals), -1, dtype=np.int64)
    _serve_all(
        arrivals.times_s, arrivals.models.view(np.uint32), tables.slo_s, begin, holders, rows, tables.stage_s,
        len(shape), finish_s, sent,
    )  # fmt: skip
    took_s = np.where(sent >= 0, finish_s + OVERHEAD_S - arrivals.times_s, -1.0)
    return Outcome(took_s, sent)
