"""AlpaServe's Algorithm 1: add the replica after which the trace fares best, keeping the `width` best at each step.

Li et al., OSDI 2023. Every extension of every kept placement is simulated, as far as the new replica reaches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.placement import Shape
from planning.placement.dedicated import most_replicas
from planning.placement.greedy import move_into_order
from planning.placement.partitions import uniform_partitions
from planning.placement.problem import Problem
from planning.placement.uniform import Found, UniformSearch, no_partition
from planning.simulation.board import (
    Board,
    Costs,
    Trace,
    clear_marks,
    mark_component,
    placement_of,
    score,
    simulate_marked,
)
from planning.simulation.compiled import compiled
from planning.simulation.tables import Floats


@compiled
def _try_all(trace: Trace, costs: Costs, board: Board, room: Floats, scores: Floats) -> int:
    """`scores[g, m]` after adding model m to group g; -inf where it does not fit. The board is left as it was."""
    groups, models = board.members.shape
    order, sent = board.order.copy(), board.sent.copy()
    good, latency_s = board.good.copy(), board.latency_s.copy()
    simulated = 0
    for group in range(groups):
        for model in range(models):
            scores[group, model] = -np.inf
            if board.members[group, model] or costs.weights[model, board.shape[group]] > room[group]:
                continue
            board.members[group, model] = 1
            move_into_order(board, group)
            clear_marks(board)
            mark_component(board, group)
            simulated += simulate_marked(costs, trace, board)
            scores[group, model] = score(trace, board)
            board.members[group, model] = 0
            board.order[:], board.sent[:] = order, sent
            board.good[:], board.latency_s[:] = good, latency_s
    return simulated


@compiled
def _add(trace: Trace, costs: Costs, board: Board, group: int, model: int) -> None:
    board.members[group, model] = 1
    move_into_order(board, group)
    clear_marks(board)
    mark_component(board, group)
    simulate_marked(costs, trace, board)


def beam(problem: Problem, shapes: Sequence[Shape], width: int = 1) -> Found:
    """The best placement that any step met, in groups of these shapes.

    Of equal scores the one earlier in (kept placement, group, model) order is kept; placements that differ in nothing
    but the order of groups count once.
    """
    board = problem.board(shapes)
    best, simulated = Found(placement_of(problem.tables, board), -1.0, 0), 0
    kept = [board]
    while kept:
        steps: list[tuple[float, int, int, int]] = []
        for number, one in enumerate(kept):
            scores = np.empty(one.members.shape)
            simulated += _try_all(problem.trace, problem.costs, one, _room(problem, one), scores)
            steps += [(-scores[g, m], number, g, m) for g, m in np.argwhere(scores > -np.inf).tolist()]
        kept = _extended(problem, kept, sorted(steps), width)
        if kept and (reached := score(problem.trace, kept[0])) > best.score:
            best = Found(placement_of(problem.tables, kept[0]), reached, 0)
    return Found(best.placement, best.score, simulated)


def _extended(
    problem: Problem, boards: Sequence[Board], steps: Sequence[tuple[float, int, int, int]], width: int
) -> list[Board]:  # fmt: skip
    seen: set[tuple[tuple[int, bytes], ...]] = set()
    extended: list[Board] = []
    for _, number, group, model in steps:
        if len(extended) == width:
            break
        board = _copy(boards[number])
        _add(problem.trace, problem.costs, board, group, model)
        key = tuple((int(board.shape[g]), board.members[g].tobytes()) for g in board.order)
        if key not in seen:
            seen.add(key)
            extended.append(board)
    return extended


def _copy(board: Board) -> Board:
    fresh = board._replace(**{name: field.copy() for name, field in board._asdict().items()})
    return fresh._replace(busy=fresh.last.view(np.int64))


def _room(problem: Problem, board: Board) -> Floats:
    used = (board.members * problem.costs.weights[:, board.shape].T).sum(axis=1, where=board.members.astype(bool))
    room: Floats = problem.fleet.budget_bytes - used
    return room


def alg1_beam(problem: Problem, width: int = 1) -> Found:
    """Algorithm 1 in every uniform partition (Algorithm 2 without buckets); the best score, the first on ties."""
    found = [beam(problem, shapes, width) for shapes in uniform_partitions(problem.fleet, problem.fleet.devices)]
    if not found:
        raise no_partition(problem)
    best = max(found, key=lambda one: one.score)
    return Found(best.placement, best.score, sum(one.simulated for one in found))


def promising_beam(problem: Problem, found: Found, most_requests: float) -> Found | None:
    """Algorithm 1 in the partitions that could score higher than what was found, the most promising first.

    None if no partition could, or if all that could take more than `most_requests` simulated requests by estimate.
    """
    partitions = list(uniform_partitions(problem.fleet, problem.fleet.devices))
    bounds = UniformSearch.of(problem, partitions, problem.everyone, worth_bounding=0.0).bounds
    best, spent = None, 0.0
    for bound, shapes in sorted(zip(bounds, partitions, strict=True), key=lambda one: -one[0]):
        spent += _effort(problem, shapes)
        if bound <= found.score or spent > most_requests:
            break
        tried = beam(problem, shapes)
        best = tried if best is None or tried.score > best.score else best
    return best


def _effort(problem: Problem, shapes: Sequence[Shape]) -> float:
    """Requests that a beam of width 1 simulates: half of all for each extension of each step, roughly."""
    numbers = np.array([problem.tables.shape_number(shape) for shape in shapes])
    replicas = most_replicas(problem.costs, problem.everyone, numbers, problem.fleet.budget_bytes)
    return replicas * len(shapes) * len(problem.fleet.models) * len(problem.arrivals) / 2


def sr_search(problem: Problem, width: int = 3) -> Found:
    """Selective replication by beam search: Algorithm 1 on groups of one device."""
    return beam(problem, (Shape(1, 1),) * problem.fleet.devices, width)
