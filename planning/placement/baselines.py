"""The policies that AlpaServe is compared with, by their published names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data.errors import Infeasible, InvalidInput
from data.placement import Arrivals, Group, Placement, Schedule, Shape
from planning.placement.greedy import greedy
from planning.placement.problem import Problem

ONE = Shape(1, 1)


def sr_greedy(problem: Problem) -> Placement:
    """Selective replication: the fast heuristic on groups of one device."""
    return greedy(problem, (ONE,) * problem.fleet.devices)[0]


def sr_uniform(problem: Problem) -> Placement:
    """Device i holds models i, i + 1, … (modulo their number), as many as fit.

    Raises `InvalidInput` if sizes differ.
    """
    weights = problem.costs.weights[:, problem.tables.shape_number(ONE)]
    models = len(weights)
    if (weights != weights[0]).any():
        raise InvalidInput("uniform replication needs models of equal size; use sr-greedy for mixed ones")
    each = min(int(problem.fleet.budget_bytes // weights[0]), models)
    return Placement(
        tuple(
            Group(ONE, tuple(sorted((device + offset) % models for offset in range(each))))
            for device in range(problem.fleet.devices)
        )
    ).normalised()


def clockwork(problem: Problem, arrivals: Arrivals, window_s: float) -> Schedule:
    """Clockwork++ (`sr-replace-T`): selective replication for every window of the trace it is judged on.

    It sees the future and swaps for nothing, so it is an oracle and no competitor under the same rules. A window ends
    at the first request more than `window_s` after the window's first.
    """
    starts_s, placements = [], []
    begin = 0
    while begin < len(arrivals):
        first_s = arrivals.times_s[begin]
        late = (arrivals.times_s[begin:] - first_s > window_s).nonzero()[0]
        end = begin + int(late[0]) if len(late) else len(arrivals)
        starts_s.append(float(first_s))
        placements.append(sr_greedy(Problem(problem.fleet, arrivals.part(begin, end))))
        begin = end
    return Schedule(tuple(starts_s), tuple(placements))


@dataclass(slots=True)
class _Filling:
    shape: Shape
    models: list[int]
    room_bytes: float


def mp_round_robin(problem: Problem) -> Placement:
    """Groups (1, 4) and what is left over; models in order go to the next group in turn until a pass places none.

    The turn passes on only after a success: a model that the current group holds or cannot hold is skipped.
    """
    groups = [_Filling(shape, [], problem.fleet.budget_bytes) for shape in _fours(problem)]
    turn, placed = 0, True
    while placed:
        placed = False
        for model in range(len(problem.fleet.models)):
            group = groups[turn]
            weight = problem.costs.weights[model, problem.tables.shape_number(group.shape)]
            if model not in group.models and weight <= group.room_bytes:
                group.models.append(model)
                group.room_bytes -= weight
                turn, placed = (turn + 1) % len(groups), True
    return Placement(tuple(Group(group.shape, tuple(sorted(group.models))) for group in groups)).normalised()


def mp_greedy(problem: Problem, stages: int) -> Placement:
    """The fast heuristic on groups of `stages` devices as so many stages. The devices must divide evenly."""
    if problem.fleet.devices % stages:
        raise InvalidInput(f"{problem.fleet.devices} devices do not make groups of {stages}; choose a divisor")
    return greedy(problem, (Shape(1, stages),) * (problem.fleet.devices // stages))[0]


def mp_equal(problem: Problem, shape: Shape) -> Placement:
    """Each model alone on a group of this shape.

    Raises `Infeasible` if there are too few devices or too little memory.
    """
    placement = Placement(tuple(Group(shape, (model,)) for model in range(len(problem.fleet.models))))
    if placement.devices > problem.fleet.devices:
        raise Infeasible(
            f"{placement.devices} devices would be needed for a group {shape} each; choose a smaller shape"
        )
    weights = problem.costs.weights[:, problem.tables.shape_number(shape)]
    heavy = [m.name for m, w in zip(problem.fleet.models, weights, strict=True) if w > problem.fleet.budget_bytes]
    if heavy:
        raise Infeasible(f"{', '.join(heavy)} do not fit on a group {shape}; choose a larger shape")
    return placement


def _fours(problem: Problem) -> Sequence[Shape]:
    devices = problem.fleet.devices
    left = [Shape(1, 1 << bit) for bit in range(2) if devices % 4 >> bit & 1]
    return (Shape(1, 4),) * (devices // 4) + tuple(left)
