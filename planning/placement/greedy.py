"""AlpaServe's fast heuristic: place the model with most unserved requests in the group that was sent fewest.

Li et al., OSDI 2023, §4.2. One simulation of the trace follows each added replica; of it, only the component that
the replica is in. Everything is decided on whole numbers, with ties as said at `fill`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.placement import Placement, Shape
from planning.placement.problem import Problem
from planning.simulation.board import (
    Board,
    Costs,
    Trace,
    clear_marks,
    mark_component,
    placement_of,
    score,
    simulate_all,
    simulate_marked,
)
from planning.simulation.compiled import compiled
from planning.simulation.requests import Bytes
from planning.simulation.tables import Floats, Ints


@compiled
def _comes_before(members: Bytes, one: int, other: int) -> bool:
    """Whether the sorted list of models of group `one` precedes that of `other`."""
    models = members.shape[1]
    for model in range(models):
        if members[one, model] != members[other, model]:
            shorter, longer = (other, one) if members[one, model] else (one, other)
            for later in range(model + 1, models):
                if members[shorter, later]:
                    return bool(longer == one)
            return bool(shorter == one)
    return False


@compiled
def move_into_order(board: Board, group: int) -> None:
    """Put a group that has just changed where it belongs among the others, which are in order."""
    order = board.order
    place = 0
    while order[place] != group:
        place += 1
    while place and _comes_before(board.members, group, order[place - 1]):
        order[place] = order[place - 1]
        place -= 1
        order[place] = group
    while place + 1 < len(order) and _comes_before(board.members, order[place + 1], group):
        order[place] = order[place + 1]
        place += 1
        order[place] = group


@compiled
def _next_replica(
    trace: Trace, costs: Costs, board: Board, room: Floats, allowed: Bytes, rank: Ints
) -> tuple[int, int]:
    """(group, model) to add, (-1, -1) if nothing fits.

    Groups by requests sent, then in their order; models by requests unserved, then by `rank`.
    """
    groups, models = board.members.shape
    tried = np.zeros(groups, dtype=np.uint8)
    for _ in range(groups):
        group = -1
        for place in range(groups):
            other = board.order[place]
            if not tried[other] and (group < 0 or board.sent[other] < board.sent[group]):
                group = other
        tried[group] = 1
        best, most = -1, -1
        for model in range(models):
            unserved = trace.begin[model + 1] - trace.begin[model] - board.good[model]
            wanted = unserved > most or (unserved == most and rank[model] < rank[best])
            fits = costs.weights[model, board.shape[group]] <= room[group]
            if wanted and fits and allowed[model] and not board.members[group, model]:
                best, most = model, unserved
        if best >= 0:
            return group, best
    return -1, -1


@compiled
def _room_for_all(costs: Costs, board: Board, room: Floats, allowed: Bytes) -> bool:
    """Whether every group has room for all models that it lacks: the end is then the same in any order."""
    groups, models = board.members.shape
    for group in range(groups):
        missing = 0.0
        for model in range(models):
            if allowed[model] and not board.members[group, model]:
                missing += costs.weights[model, board.shape[group]]
        if missing > room[group]:
            return False
    return True


@compiled
def fill(trace: Trace, costs: Costs, board: Board, budget_bytes: float, allowed: Bytes, rank: Ints) -> int:
    """Add replicas of the allowed models to empty groups until no group has room; returns the requests simulated.

    Ties between groups go to the first in the normalised order, ties between models to the lowest `rank`.
    """
    groups = board.members.shape[0]
    room = np.full(groups, budget_bytes)
    if _room_for_all(costs, board, room, allowed):
        for group in range(groups):
            board.members[group] = allowed
        return simulate_all(costs, trace, board)
    simulated = 0
    while True:
        group, model = _next_replica(trace, costs, board, room, allowed, rank)
        if group < 0:
            return simulated
        board.members[group, model] = 1
        room[group] -= costs.weights[model, board.shape[group]]
        move_into_order(board, group)
        clear_marks(board)
        mark_component(board, group)
        simulated += simulate_marked(costs, trace, board)


def greedy(
    problem: Problem, shapes: Sequence[Shape], allowed: Bytes | None = None, rank: Ints | None = None
) -> tuple[Placement, float]:
    """Groups of these shapes filled by the heuristic, and AlpaServe's score of them."""
    board = problem.board(shapes)
    chosen = problem.everyone if allowed is None else allowed
    ranking = problem.by_number if rank is None else rank
    fill(problem.trace, problem.costs, board, problem.fleet.budget_bytes, chosen, ranking)
    return placement_of(problem.tables, board), score(problem.trace, board)
