"""AlpaServe's placement search (`mp-search`): the heuristic on every partition into equal groups, best score wins.

Partitions that cannot win are not filled: their models would not attain enough even if each had its devices to
itself, or (with models of one kind) if every group held every model. Which partition wins does not depend on that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import numpy as np

from data.errors import Infeasible
from data.placement import Placement, Shape
from planning.placement.dedicated import most_replicas, nothing_known, partition_bound
from planning.placement.greedy import fill
from planning.placement.partitions import uniform_partitions
from planning.placement.problem import Problem
from planning.simulation.board import Board, board_of, placement_of, score, simulate_all
from planning.simulation.requests import Bytes
from planning.simulation.tables import Ints

_WORTH_BOUNDING = 300_000  # requests × replicas: a few ms of filling
_ANY = 2.0  # no score is as high


@dataclass(frozen=True)
class Found:
    """A placement with AlpaServe's score, and how many requests were simulated to find it."""

    placement: Placement
    score: float
    simulated: int


@dataclass(frozen=True)
class UniformSearch:
    """The partitions of some devices among the allowed models, with what each could reach at most."""

    problem: Problem
    partitions: tuple[Ints, ...]
    allowed: Bytes
    prune: bool = True
    worth_bounding: float = _WORTH_BOUNDING
    known: Ints | None = None

    @classmethod
    def of(
        cls, problem: Problem, partitions: Sequence[Sequence[Shape]], allowed: Bytes, *,
        prune: bool = True, worth_bounding: float = _WORTH_BOUNDING, known: Ints | None = None,
    ) -> UniformSearch:  # fmt: skip
        """The search over partitions given as shapes; searches may share what is `known` of single models."""
        number = {shape: index for index, shape in enumerate(problem.tables.shapes)}
        numbered = tuple(np.array([number[shape] for shape in shapes]) for shapes in partitions)
        return cls(problem, numbered, allowed, prune, worth_bounding, known)

    @cached_property
    def bounds(self) -> list[float]:
        """Scores that the partitions cannot exceed."""
        if not self.prune or self._effort < self.worth_bounding:
            return [_ANY] * len(self.partitions)
        alike = len(set(self.problem.tables.kinds[self.allowed.astype(bool)].tolist())) == 1
        known = nothing_known(self.problem.costs, self.problem.fleet.devices) if self.known is None else self.known
        return [self._bound(known, shapes, alike=alike) for shapes in self.partitions]

    @property
    def bound(self) -> float:
        """A score that the search cannot exceed."""
        return max(self.bounds, default=0.0)

    def run(self, floor: float = -inf) -> Found | None:
        """The best partition, the first on ties; None if the best score is not above `floor`."""
        problem, budget_bytes = self.problem, self.problem.fleet.budget_bytes
        best: tuple[float, int, Board | None] = (floor, 1, None)
        simulated = 0
        for index in sorted(range(len(self.partitions)), key=lambda index: -self.bounds[index]):
            if self.bounds[index] < best[0]:
                break
            board = board_of(problem.costs, problem.trace, self.partitions[index])
            simulated += fill(problem.trace, problem.costs, board, budget_bytes, self.allowed, problem.by_number)
            best = max(best, (score(problem.trace, board), -index, board), key=lambda one: one[:2])
        return Found(placement_of(problem.tables, best[2]), best[0], simulated) if best[2] else None

    @property
    def _effort(self) -> float:
        budget_bytes = self.problem.fleet.budget_bytes
        replicas = sum(
            most_replicas(self.problem.costs, self.allowed, shapes, budget_bytes) for shapes in self.partitions
        )
        return replicas * len(self.problem.arrivals)

    def _bound(self, known: Ints, shapes: Ints, *, alike: bool) -> float:
        problem, budget_bytes = self.problem, self.problem.fleet.budget_bytes
        bound = partition_bound(problem.costs, problem.trace, known, self.allowed, shapes, budget_bytes)
        if not alike or (shapes != shapes[0]).any():
            return bound
        # Equal groups serve most requests of a kind if each holds all models.
        board = board_of(problem.costs, problem.trace, shapes, np.tile(self.allowed, (len(shapes), 1)))
        simulate_all(problem.costs, problem.trace, board)
        replicas = most_replicas(problem.costs, self.allowed, shapes, budget_bytes)
        return min(bound, float(board.good.sum()) / max(len(problem.arrivals), 1) + replicas / 1e6)


def no_partition(problem: Problem) -> Infeasible:
    """The error of a fleet that no shape fits into."""
    return Infeasible(f"no model was profiled in a shape for {problem.fleet.devices} devices; profile smaller shapes")


def mp_search(problem: Problem, *, prune: bool = True) -> Found:
    """The best uniform partition of all devices.

    Raises `Infeasible` if no partition exists. With `prune` off every partition is filled, to the same end.
    """
    partitions = list(uniform_partitions(problem.fleet, problem.fleet.devices))
    found = UniformSearch.of(problem, partitions, problem.everyone, prune=prune).run()
    if found is None:
        raise no_partition(problem)
    return found
