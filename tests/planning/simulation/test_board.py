"""A change is simulated as far as it reaches, and what that leaves known equals a whole replay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.placement import Group, Placement, Shape
from planning.placement.problem import Problem
from planning.simulation.board import Board, placement_of, simulate_around
from planning.simulation.requests import replay
from tests.planning.shared_fleets import arrivals, fleet

MIXED = Problem(fleet(["small", "large"] * 3, devices=16), arrivals(6, duration_s=40.0, rate_rps=4.0))
ALIKE = Problem(fleet(["small"] * 6, devices=16), arrivals(6, duration_s=40.0, rate_rps=4.0))


def agrees(problem: Problem, board: Board) -> None:
    outcome = replay(problem.tables, placement_of(problem.tables, board), problem.arrivals)
    good = np.bincount(problem.arrivals.models[outcome.good], minlength=6)
    assert board.good.tolist() == good.tolist()
    assert board.latency_s.sum() == pytest.approx(outcome.response_s[outcome.good].sum())
    sent = np.bincount(outcome.group[outcome.group >= 0], minlength=len(board.shape))
    assert board.sent[board.order].tolist() == sent.tolist()


@settings(deadline=None, max_examples=40)
@given(
    alike=st.booleans(),
    shapes=st.lists(st.sampled_from([Shape(1, 1), Shape(1, 2), Shape(2, 2), Shape(1, 8)]), min_size=1, max_size=4),
    flips=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=12),
)
def test_any_series_of_changes(alike: bool, shapes: list[Shape], flips: list[tuple[int, int]]) -> None:
    problem = ALIKE if alike else MIXED
    board = problem.board(shapes)
    for group, model in flips:
        group %= len(shapes)
        before = board.members[:, model].copy()
        board.members[group, model] ^= 1
        for touched in {group, *np.flatnonzero(before).tolist()}:
            simulate_around(problem.costs, problem.trace, board, touched)
        if not board.members[:, model].any():
            board.good[model], board.latency_s[model] = 0, 0.0
    agrees(problem, board)


def test_other_components_are_left_alone() -> None:
    groups = (Group(Shape(1, 1), (0, 2)), Group(Shape(1, 1), (1,)))
    board = MIXED.board_with(Placement(groups))
    of_small = int(MIXED.arrivals.counts(6)[[0, 2]].sum())
    assert simulate_around(MIXED.costs, MIXED.trace, board, 0) == of_small
    agrees(MIXED, board)
