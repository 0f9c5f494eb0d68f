"""Exact formulations as integer programs, for small cases.

`sr_ilp` and `mp_ilp` are AlpaServe's (Li et al., OSDI 2023, artifact): they maximise the smallest ratio of what a
model's replicas can do to what it is asked for, and nearly nothing else. `most_served` is ours: the replicas that let
most requests meet their SLO if sharing cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import TYPE_CHECKING

import numpy as np

from data.errors import Infeasible
from data.placement import Group, Placement, Shape
from planning.placement.problem import Problem

if TYPE_CHECKING:
    import pulp

_SUM_WEIGHT = 1e-4
_MP_SHAPES = (Shape(1, 1), Shape(1, 2), Shape(1, 4), Shape(1, 8))
_STAGE_LOSS = 0.99


def sr_ilp(problem: Problem, limit_s: float = 30.0) -> Placement:
    """Selective replication by PuLP and HiGHS: maximise the least served model, memory per device."""
    import pulp

    one = Shape(1, 1)
    number = problem.tables.shape_number(one)
    models, devices = range(len(problem.fleet.models)), range(problem.fleet.devices)
    program = pulp.LpProblem("sr", pulp.LpMaximize)
    on = {(m, d): program.add_variable(f"p_{m}_{d}", cat="Binary") for m in models for d in devices}
    needs = [_line_s(problem, m, one) * problem.fleet.models[m].rate_rps for m in models]
    shares = [pulp.lpSum(on[m, d] for d in devices) * (1 / needs[m]) for m in models]
    least = _fair_objective(program, shares)
    for device in devices:
        weights = problem.costs.weights[:, number]
        program += pulp.lpSum(on[m, device] * weights[m] for m in models) <= problem.fleet.budget_bytes
    _solve(program, limit_s, least)
    held = [tuple(m for m in models if _is_one(on[m, d])) for d in devices]
    return Placement(tuple(Group(one, members) for members in held)).normalised()


def mp_ilp(problem: Problem, limit_s: float = 30.0) -> Placement:
    """Model parallelism by PuLP and HiGHS: up to as many groups as devices, each of no or one pipeline shape.

    As published, memory is summed over a group, so that a placement may break memory rule A: check it.
    """
    import pulp

    models, slots = range(len(problem.fleet.models)), range(problem.fleet.devices)
    shapes = [shape for shape in _MP_SHAPES if shape in problem.fleet.shapes]
    program = pulp.LpProblem("mp", pulp.LpMaximize)
    on = {(m, j): program.add_variable(f"p_{m}_{j}", cat="Binary") for m in models for j in slots}
    has = {(j, k): program.add_variable(f"s_{j}_{k}", cat="Binary") for j in slots for k in range(len(shapes))}
    both = {(m, *jk): program.add_variable(f"x_{m}_{jk[0]}_{jk[1]}", cat="Binary") for m in models for jk in has}
    for (m, j, k), product in both.items():
        program += product <= on[m, j]
        program += product <= has[j, k]
        program += product >= on[m, j] + has[j, k] - 1
    for j in slots:
        program += pulp.lpSum(has[j, k] for k in range(len(shapes))) <= 1
        room = problem.fleet.budget_bytes * pulp.lpSum(
            has[j, k] * shape.devices for k, shape in enumerate(shapes)
        )  # fmt: skip
        program += pulp.lpSum(on[m, j] * _whole_bytes(problem, m) for m in models) <= room
    sizes = [has[j, k] * shapes[k].devices for j, k in has]
    program += pulp.lpSum(sizes) == problem.fleet.devices
    shares = [
        pulp.lpSum(both[m, j, k] * _capability(problem, m, shapes[k]) for j, k in has)
        * (1 / problem.fleet.models[m].rate_rps)
        for m in models
    ]
    _solve(program, limit_s, _fair_objective(program, shares))
    groups = [
        Group(shapes[k], tuple(m for m in models if _is_one(on[m, j]))) for j, k in has if _is_one(has[j, k])
    ]  # fmt: skip
    return Placement(tuple(groups)).normalised()


def most_served(problem: Problem, shapes: Sequence[Shape], served: Sequence[Sequence[float]]) -> Placement:
    """The placement in groups of these shapes that serves most requests if sharing cost nothing (cvxpy, HiGHS).

    `served[m][r]` requests of model m are met by r replicas, 0 first, with gains that do not grow.
    """
    import cvxpy as cp

    models, groups = len(served), len(shapes)
    on = cp.Variable((models, groups), boolean=True)
    gains = [np.diff(np.asarray(row, dtype=float)) for row in served]
    parts = [cp.Variable(len(gain), boolean=True) for gain in gains]
    numbers = [problem.tables.shape_number(shape) for shape in shapes]
    weights = problem.costs.weights[:, numbers] / problem.fleet.budget_bytes
    fits = np.where(np.isfinite(weights), weights, 2.0)
    limits = [on[:, g] @ fits[:, g] <= 1 for g in range(groups)]
    limits += [part @ np.ones(part.size) <= on[m, :] @ np.ones(groups) for m, part in enumerate(parts)]
    total = sum(gain @ part for gain, part in zip(gains, parts, strict=True))
    program = cp.Problem(cp.Maximize(total), limits)
    program.solve(solver=cp.HIGHS)  # type: ignore[no-untyped-call]
    if on.value is None:
        raise Infeasible(f"the integer program has no solution ({program.status}); check memory and shapes")
    held = [tuple(np.flatnonzero(on.value[:, g] > 0.5).tolist()) for g in range(groups)]
    return Placement(tuple(Group(shape, members) for shape, members in zip(shapes, held, strict=True))).normalised()


def _fair_objective(program: pulp.LpProblem, shares: Sequence[pulp.LpAffineExpression]) -> pulp.LpVariable:
    import pulp

    least = program.add_variable("least")
    program += least + _SUM_WEIGHT * pulp.lpSum(shares)
    for share in shares:
        program += least <= share
    return least


def _solve(program: pulp.LpProblem, limit_s: float, value: pulp.LpVariable) -> None:
    import pulp

    program.solve(pulp.HiGHS(msg=False, timeLimit=limit_s, threads=1))
    if value.varValue is None:
        raise Infeasible("the integer program found no placement in its time; allow more or drop a model")


def _is_one(variable: pulp.LpVariable) -> bool:
    return bool(variable.varValue is not None and variable.varValue > 0.5)


def _line_s(problem: Problem, model: int, shape: Shape) -> float:
    profile = problem.fleet.profile(model, shape)
    if profile is None:
        raise Infeasible(f"{problem.fleet.models[model].name} was not profiled in shape {shape}; use another policy")
    return sum(profile.latency_s)


def _whole_bytes(problem: Problem, model: int) -> float:
    """Weights of a model in its smallest shape."""
    profiles = problem.fleet.profiles[problem.fleet.models[model].kind]
    smallest = min(profiles, key=lambda shape: (shape.devices, shape))
    return sum(profiles[smallest].weight_bytes) * smallest.shards


def _capability(problem: Problem, model: int, shape: Shape) -> float:
    """Requests in flight that still meet the SLO, less 1 % for each stage."""
    profile = problem.fleet.profile(model, shape)
    if profile is None:
        return 0.0
    spare_s = problem.fleet.models[model].slo_s - sum(profile.latency_s)
    return max(0, floor(spare_s / max(profile.latency_s)) + 1) * _STAGE_LOSS**shape.stages
