"""Local search in machine code: propose, simulate what the proposal reaches, keep what is no worse."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from planning.placement.moves import Layout, propose, undo
from planning.simulation.board import Board, Costs, Trace, clear_marks, gather, mark_component, run, run_alike, seat
from planning.simulation.compiled import compiled
from planning.simulation.requests import Bytes, Indices
from planning.simulation.tables import Floats, Ints


class Goal(NamedTuple):
    """What a search maximises: `weight[s]` per request that is served in time in segment s of the trace.

    `cuts` are the request numbers where segments begin, and the end of the last. Segments with `guarded[s]` must
    together not fall below `floor` good requests.
    """

    cuts: Ints
    weight: Floats
    guarded: Bytes
    floor: Ints


class Record(NamedTuple):
    """What is known of the placement on the board: `good[s, m]`, the sums that count, and how much was simulated."""

    good: Ints
    value: Floats
    guarded: Ints
    counts: Ints  # proposals, accepted, simulated requests
    changed: Bytes  # the models that the last change reached


@compiled
def _run_segments(
    costs: Costs, trace: Trace, board: Board, goal: Goal, record: Record, fresh: Ints, slack: float
) -> bool:
    """Serve the marked models' requests, `fresh[s, m]` telling how many were good; false if given up early.

    It is given up when the first segments fall short of what is known by more than `slack` of their requests.
    """
    alike, first = True, -1
    for model in range(board.model_on.shape[0]):
        if board.model_on[model]:
            alike = alike and (first < 0 or costs.kinds[model] == costs.kinds[first])
            first = model
    seat(costs, board)
    record.changed[:] = board.model_on
    for model in range(board.model_on.shape[0]):
        if board.begin[model] == board.begin[model + 1]:
            board.model_on[model] = 0  # nobody holds it any more
    count = gather(trace, board)
    chosen: Indices = board.chosen
    position, behind, weight = 0, 0.0, 0.0
    for segment in range(goal.weight.shape[0]):
        begin = position
        while position < count and chosen[position] < goal.cuts[segment + 1]:
            position += 1
        if begin < position:
            if alike:
                run_alike(costs, trace, board, chosen, begin, position)
            else:
                run(costs, trace, board, chosen, begin, position)
        for model in range(board.model_on.shape[0]):
            if record.changed[model]:
                fresh[segment, model] = board.good[model]
                board.good[model] = 0
                behind += goal.weight[segment] * (record.good[segment, model] - fresh[segment, model])
        weight += goal.weight[segment] * (position - begin)
        if behind > slack * weight + 3.0:
            record.counts[2] += position
            return False
    record.counts[2] += position
    return True


@compiled
def _gains(board: Board, goal: Goal, record: Record, fresh: Ints) -> tuple[float, int]:
    """By how much the value and the guarded requests change."""
    value, guarded = 0.0, 0
    for segment in range(goal.weight.shape[0]):
        for model in range(board.model_on.shape[0]):
            if record.changed[model]:
                change = fresh[segment, model] - record.good[segment, model]
                value += goal.weight[segment] * change
                guarded += goal.guarded[segment] * change
    return value, guarded


@compiled
def _keep(board: Board, record: Record, fresh: Ints, value: float, guarded: int) -> None:
    for segment in range(record.good.shape[0]):
        for model in range(board.model_on.shape[0]):
            if record.changed[model]:
                record.good[segment, model] = fresh[segment, model]
    record.value[0] += value
    record.guarded[0] += guarded


@compiled
def measure(costs: Costs, trace: Trace, board: Board, goal: Goal, record: Record) -> None:
    """Fill the record for the placement on the board."""
    record.good[:] = 0
    record.value[0], record.guarded[0] = 0.0, 0
    fresh = np.zeros_like(record.good)
    clear_marks(board)
    for group in range(board.members.shape[0]):
        mark_component(board, group)
    _run_segments(costs, trace, board, goal, record, fresh, np.inf)
    value, guarded = _gains(board, goal, record, fresh)
    _keep(board, record, fresh, value, guarded)


@compiled
def _mark_change(board: Board, layout: Layout) -> None:
    """Mark what the touched groups reached before the change, and what they reach now."""
    groups, models = board.group_on.copy(), board.model_on.copy()
    clear_marks(board)
    for number in range(layout.touched[0]):
        mark_component(board, layout.touched[number + 1])
    board.group_on[:] = board.group_on | groups
    board.model_on[:] = board.model_on | models


@compiled
def climb(
    costs: Costs, trace: Trace, board: Board, layout: Layout, goal: Goal, record: Record, budget_bytes: float,
    devices: int, steps: int, seed: int, structural: float, heat: float, slack: float
) -> None:  # fmt: skip
    """Try `steps` proposals. One is kept if it is no worse, or worse by less than an exponential draw of mean `heat`.

    The guarded requests never fall below the floor, once they have reached it.
    """
    np.random.seed(seed)
    fresh = np.zeros_like(record.good)
    models = record.good.shape[1]
    unserved = np.zeros(models, dtype=np.int64)
    asked = trace.begin[1:] - trace.begin[:-1]
    before = board.members.copy()
    for _ in range(steps):
        for model in range(models):
            unserved[model] = asked[model] - record.good[:, model].sum()
        record.counts[0] += 1
        if not propose(costs, board, layout, unserved, budget_bytes, devices, structural):
            undo(board, layout)
            continue
        _mark_before(board, layout, before)
        _mark_change(board, layout)
        if _run_segments(costs, trace, board, goal, record, fresh, slack):
            value, guarded = _gains(board, goal, record, fresh)
            least = min(goal.floor[0], record.guarded[0])
            if value >= np.log(np.random.random()) * heat and record.guarded[0] + guarded >= least:
                _keep(board, record, fresh, value, guarded)
                record.counts[1] += 1
                for number in range(layout.touched[0]):
                    before[layout.touched[number + 1]] = board.members[layout.touched[number + 1]]
                continue
        undo(board, layout)


@compiled
def _mark_before(board: Board, layout: Layout, before: Bytes) -> None:
    """Mark what the touched groups reached in `before`."""
    groups, models = before.shape
    clear_marks(board)
    stack = np.empty(groups, dtype=np.int64)
    depth = 0
    for number in range(layout.touched[0]):
        group = layout.touched[number + 1]
        if not board.group_on[group]:
            board.group_on[group] = 1
            stack[depth] = group
            depth += 1
    while depth:
        depth -= 1
        group = stack[depth]
        for model in range(models):
            if before[group, model] and not board.model_on[model]:
                board.model_on[model] = 1
                for other in range(groups):
                    if before[other, model] and not board.group_on[other]:
                        board.group_on[other] = 1
                        stack[depth] = other
                        depth += 1
