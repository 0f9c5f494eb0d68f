"""Policies of least average cost: the program against policy iteration, the rules beside it, and a case by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import Infeasible
from planning.policy import Problem, Solution, decide, hysteretic, iterate, myopic, settled, solve_exactly


def _problem(seed: int, most: int = 6, options: int = 5, dear: float = 30.0) -> Problem:
    random = np.random.default_rng(seed)
    rates = np.diag(random.uniform(0.1, 1, most), 1) + np.diag(random.uniform(0.1, 1, most), -1)
    needed = np.concatenate([[0], np.sort(random.integers(1, most + 1, options - 1))])
    serving = np.concatenate([[500.0], np.sort(random.uniform(5, 20, options - 1))[::-1]])
    moving = random.uniform(0, dear, (options, options))
    np.fill_diagonal(moving, 0.0)
    return Problem(rates, np.arange(most + 1)[:, None] >= needed[None, :], serving, moving)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_policy_iteration_finds_what_the_program_finds(seed: int) -> None:
    problem = _problem(seed)
    exact, iterated = solve_exactly(problem), iterate(problem)
    assert exact.average == pytest.approx(iterated.average, rel=1e-6)
    for rule in (myopic(problem), hysteretic(problem, 0.1)):
        assert exact.average <= rule.average + 1e-6
    for solution in (exact, iterated):
        counts = np.arange(len(problem.rates))[:, None]
        assert problem.fits[counts, solution.choice].all()


def test_a_flip_that_costs_more_than_it_brings_is_not_made() -> None:
    """Two instances let a slightly better option fit, for a second on average each time."""
    rates = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    rates[0, 1] = 1.0
    fits = np.array([[True, False, False], [True, True, False], [True, True, True]])
    moving = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 4.0], [0.0, 4.0, 0.0]])
    problem = Problem(rates, fits, np.array([100.0, 10.0, 9.0]), moving)
    assert solve_exactly(problem).choice[2, 1] == 1
    assert myopic(problem).choice[2, 1] == 2
    # Staying costs 10 per second; flipping 9.5 and two moves of 4 every two seconds.
    assert solve_exactly(problem).average == pytest.approx(10.0)
    assert myopic(problem).average == pytest.approx(9.5 + 4.0)


def test_running_nothing_must_always_be_possible() -> None:
    with pytest.raises(Infeasible, match="option 0"):
        Problem(np.zeros((2, 2)), np.array([[False, True], [True, True]]), np.zeros(2), np.zeros((2, 2)))


@given(st.integers(0, 10_000), st.sampled_from(["optimal", "myopic", "hysteresis"]))
@settings(max_examples=30, deadline=None)
def test_choosing_twice_is_choosing_once(seed: int, rule: str) -> None:
    """Also where moving costs obey no triangle inequality and policies therefore make detours."""
    problem = _problem(seed, most=4, options=6)
    found = decide(problem, rule)  # type: ignore[arg-type]
    rows = np.arange(len(problem.rates))[:, None]
    once = settled(problem, found).choice
    assert (once[rows, once] == once).all()
    assert problem.fits[rows, once].all()
    kept = found.choice[rows, found.choice] == found.choice
    assert (once == found.choice)[kept].all()


@given(st.data())
def test_any_policy_can_be_settled(data: st.DataObject) -> None:
    problem = _problem(data.draw(st.integers(0, 100)), most=3, options=5)
    choice = np.array(
        [
            [data.draw(st.sampled_from([int(one) for one in np.flatnonzero(fits)])) for _ in problem.serving]
            for fits in problem.fits
        ]
    )
    rows = np.arange(len(choice))[:, None]
    once = settled(problem, Solution(choice, 0.0)).choice
    assert (once[rows, once] == once).all()
    assert problem.fits[rows, once].all()
