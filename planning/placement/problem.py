"""What every planner is given: a fleet and the trace to plan with, made ready for the kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.placement import Arrivals, Placement, Shape, SharedFleet
from planning.simulation.board import Board, Costs, Trace, board_of, costs_of, score, simulate_all, trace_of
from planning.simulation.requests import Bytes
from planning.simulation.tables import Ints, Tables


@dataclass(frozen=True)
class Problem:
    """A planner sees this much and no more: in particular no trace but the one to plan with."""

    fleet: SharedFleet
    arrivals: Arrivals

    @cached_property
    def tables(self) -> Tables:
        """The fleet as arrays."""
        return Tables.of(self.fleet)

    @cached_property
    def costs(self) -> Costs:
        """The arrays that simulations look up."""
        return costs_of(self.tables)

    @cached_property
    def trace(self) -> Trace:
        """The arrivals as simulations read them."""
        return trace_of(self.arrivals, len(self.fleet.models))

    def board(self, shapes: Sequence[Shape]) -> Board:
        """Empty groups of these shapes."""
        numbers = np.array([self.tables.shape_number(shape) for shape in shapes], dtype=np.int64)
        return board_of(self.costs, self.trace, numbers)

    def board_with(self, placement: Placement) -> Board:
        """The groups of a placement, simulated."""
        shapes, members = self.tables.membership(placement.groups)
        board = board_of(self.costs, self.trace, shapes, members)
        simulate_all(self.costs, self.trace, board)
        return board

    def score(self, placement: Placement) -> float:
        """AlpaServe's objective of a placement."""
        return score(self.trace, self.board_with(placement))

    @cached_property
    def everyone(self) -> Bytes:
        """The choice of all models."""
        return np.ones(len(self.fleet.models), dtype=np.uint8)

    def only(self, models: Iterable[int]) -> Bytes:
        """The choice of some models."""
        chosen = np.zeros(len(self.fleet.models), dtype=np.uint8)
        chosen[list(models)] = 1
        return chosen

    @cached_property
    def by_number(self) -> Ints:
        """The ranking by model number."""
        return np.arange(len(self.fleet.models))
