"""Which option to run in every state of a fleet that changes, so that the long-run cost is least.

States are (instances, option in force); at a change of the fleet an option that fits is chosen. An
option costs something per second while it runs, and going from one to another costs something once. The
average cost is minimised exactly, by the linear program of the stationary distribution (M. L. Puterman,
Markov Decision Processes, 1994, §8.8 and §11.4), or by Howard's policy iteration where that is too large.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import splu

from data.errors import Infeasible

Matrix = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

Rule = Literal["optimal", "myopic", "hysteresis"]

MOST_EXACT = 48  # instances up to which the linear program is solved
HYSTERESIS = 0.05
_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """`rates` [n, m] of the fleet in events per second; `fits` [n, option]; `serving` cost per second of an
    option; `moving` [option, option] once. Option 0 must fit everywhere: to run nothing.
    """

    rates: Matrix
    fits: Flags
    serving: Matrix
    moving: Matrix

    def __post_init__(self) -> None:
        if not self.fits[:, 0].all():
            raise Infeasible("option 0 must fit every number of instances: it stands for running nothing")


@dataclass(frozen=True, slots=True)
class Solution:
    """`choice` [n, option in force] is the option to run from then on; `average` the cost per second."""

    choice: Ints
    average: float


def decide(problem: Problem, rule: Rule) -> Solution:
    """The solution by a rule."""
    if rule == "optimal":
        return solve(problem)
    return myopic(problem) if rule == "myopic" else hysteretic(problem, HYSTERESIS)


def settled(problem: Problem, solution: Solution) -> Solution:
    """The same policy with its chains of choices taken at once: what is chosen is not left for the same `n`.

    For fleets that look again after every change. Where moving costs obey the triangle inequality an optimal
    policy has no chains but of equal cost. A chain that goes round ends where serving is cheapest.
    """
    choice, rows = solution.choice, np.arange(len(solution.choice))[:, None]
    if (choice[rows, choice] == choice).all():
        return solution
    rank = np.argsort(np.argsort(problem.serving, kind="stable"))
    end = choice
    for _ in problem.serving:
        end = choice[rows, end]  # now on the round where the chain ends, be it of one option
    best = end
    for _ in problem.serving:
        end = choice[rows, end]
        best = np.where(rank[end] < rank[best], end, best)
    return Solution(best, evaluate(problem, best)[0])


def solve(problem: Problem) -> Solution:
    """The policy of least average cost: exactly up to `MOST_EXACT` instances, else by policy iteration."""
    exact = len(problem.rates) - 1 <= MOST_EXACT
    return solve_exactly(problem) if exact else iterate(problem)


def myopic(problem: Problem) -> Solution:
    """The option that is cheapest while it runs, whatever it costs to get there."""
    best = np.where(problem.fits, problem.serving, np.inf).argmin(axis=1)
    choice = np.repeat(best[:, None], len(problem.serving), axis=1)
    return Solution(choice, evaluate(problem, choice)[0])


def hysteretic(problem: Problem, gain: float) -> Solution:
    """As `myopic`, but what runs is kept where it fits unless the best is cheaper by the share `gain`."""
    best = myopic(problem).choice
    now = np.arange(len(problem.serving))[None, :]
    stays = problem.fits & (problem.serving[None, :] * (1 - gain) <= problem.serving[best]) & (now > 0)
    choice = np.where(stays, now, best)
    return Solution(choice, evaluate(problem, choice)[0])


def solve_exactly(problem: Problem) -> Solution:
    """The linear program over how often each decision is taken, solved by HiGHS.

    `share[n, i]` is the part of time in a state, `pace[n, i, j]` how often per unit of time a fleet that comes to n
    with i in force goes on with j. The unit is that of the quickest change: with seconds the solver gives up
    on fleets that hardly change.
    """
    cp: Any = import_module("cvxpy")  # for making plans only, and without types

    counts, options = problem.fits.shape
    rates = problem.rates / (problem.rates.max() or 1.0)
    moving = problem.moving * (problem.rates.max() or 1.0)
    share = cp.Variable((counts, options), nonneg=True)
    pace = [cp.Variable((options, options), nonneg=True) for _ in range(counts)]
    rules = [cp.sum(share) == 1]
    cost = cp.sum(cp.multiply(share, np.tile(problem.serving, (counts, 1))))
    for count in range(counts):
        fits = problem.fits[count].astype(float)
        rules.append(share[count] <= fits)
        rules.append(cp.sum(pace[count], axis=0) == share[count] * rates[count].sum())
        rules.append(cp.sum(pace[count], axis=1) == rates[:, count] @ share)
        cost += cp.sum(cp.multiply(pace[count], moving))
    program = cp.Problem(cp.Minimize(cost), rules)
    program.solve(solver=cp.HIGHS)
    if program.status not in ("optimal", "optimal_inaccurate"):
        raise Infeasible(f"no policy can be found: the program is {program.status}")
    often = np.stack([np.asarray(table.value) for table in pace])
    return improve(problem, _most_often(problem, often))


def _most_often(problem: Problem, often: Matrix) -> Ints:
    """The decision taken in every state that occurs; elsewhere the cheapest one to go to."""
    counts, options = problem.fits.shape
    fallback = myopic(problem).choice
    now = np.arange(options)[None, :]
    fallback = np.where(problem.fits & (now > 0), np.minimum(now, options - 1), fallback)
    often = np.where(problem.fits[:, None, :], often, 0.0)  # a solver keeps to what fits but for its tolerance
    seen = often.sum(axis=2) > 1e-12
    return np.where(seen, often.argmax(axis=2), fallback).astype(np.int64).reshape(counts, options)


def improve(problem: Problem, choice: Ints) -> Solution:
    """Howard's policy iteration from a given policy, until nothing gets better."""
    average, bias = evaluate(problem, choice)
    for _ in range(_ROUNDS):
        value = problem.moving[None, :, :] + bias[:, None, :]
        value = np.where(problem.fits[:, None, :], value, np.inf)
        now = np.take_along_axis(value, choice[:, :, None], axis=2)[:, :, 0]
        better = value.min(axis=2) < now - 1e-9 * (1 + np.abs(now))
        if not better.any():
            break
        choice = np.where(better, value.argmin(axis=2), choice)
        average, bias = evaluate(problem, choice)
    return Solution(choice, average)


def iterate(problem: Problem) -> Solution:
    """Policy iteration from the myopic policy."""
    return improve(problem, myopic(problem).choice)


def evaluate(problem: Problem, choice: Ints) -> tuple[float, Matrix]:
    """Average cost per second of a policy, and the bias of every state (n, option in force)."""
    counts, options = problem.fits.shape
    leaving = problem.rates.sum(axis=1)
    now = np.arange(options)
    cost = problem.serving + problem.rates @ problem.moving[now, choice]
    # Equations only of states that a choice leads to; the bias of the others follows.
    state = np.arange(counts)[:, None] * options + choice
    entered, column = np.unique(state, return_inverse=True)
    column, size = column.reshape(counts, options), len(entered)
    here, option = np.divmod(entered, options)
    row, after = np.nonzero(problem.rates[here])
    rows = np.concatenate([np.arange(size), row, np.arange(size), [size]])
    columns = np.concatenate([np.arange(size), column[after, option[row]], np.full(size, size), [size - 1]])
    values = np.concatenate([leaving[here], -problem.rates[here[row], after], np.ones(size), [1.0]])
    system = coo_matrix((values, (rows, columns)), shape=(size + 1, size + 1)).tocsc()
    solution = splu(system).solve(np.append(cost[here, option], 0.0))
    average = float(solution[size])
    bias = (cost - average + problem.rates @ solution[column]) / leaving[:, None]
    return average, bias
