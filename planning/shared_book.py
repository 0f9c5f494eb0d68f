"""A plan book of several models: for every number of instances the best placement that is found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data.cluster import ClusterSpec, ClusterState
from data.demand import Demand
from data.deployment import Deployment
from data.errors import InvalidInput
from data.placement import Arrivals, HostedModel, Placement, SharedFleet
from data.shared_plan import Forecast, SharedPlan, SharedPlanBook
from planning.hosting import Tenant, deployment_of, placement_of, shared_fleet, speeds_of
from planning.placement.bound import bound
from planning.placement.feasibility import breaches, require_feasible
from planning.placement.futures import Drift, future
from planning.placement.problem import Problem
from planning.placement.search import Clock, rehearse, search
from planning.simulation.requests import TRIM_S, replay

POLICY = "placement"
LEAST_SPAN_S = 60.0
"""A shorter history says too little: ten seconds at both ends are only warm-up."""

_KEEP = 0.005  # of attainment: what a move has to gain at least
_TOLD_REQUESTS = 4000  # drawn where rates are told and no history is there
_SHORTEST_S, _LONGEST_S = 300.0, 3600.0


@dataclass(frozen=True)
class SharedInputs:
    """What a book of several models is made from. `incumbent` has the groups that serve now, by state."""

    tenants: Sequence[Tenant]
    cluster: ClusterSpec
    arrivals: Arrivals
    budget_s: float = 10.0
    seed: int = 0
    reserve_bytes: int = 0
    incumbent: Mapping[ClusterState, Deployment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.cluster.types) != 1 or self.cluster.most[0] < 1:
            raise InvalidInput("several models share instances of one type; give one type, and at least one instance")
        if self.arrivals.span_s < LEAST_SPAN_S:
            raise InvalidInput(
                f"a history of {self.arrivals.span_s:.0f} s says too little; give {LEAST_SPAN_S:.0f} s, or rates"
            )

    @property
    def memory_bytes(self) -> int:
        """Of a device, for models."""
        return self.cluster.types[0].memory_bytes - self.reserve_bytes

    def problem(self, instances: int) -> Problem:
        """What is searched for so many instances."""
        kind = self.cluster.types[0]
        fleet = shared_fleet(self.tenants, kind, instances * kind.devices, reserve_bytes=self.reserve_bytes)
        return Problem(fleet, self.arrivals)


def told_arrivals(demands: Sequence[Demand], seed: int = 0) -> Arrivals:
    """Some thousands of arrivals at the rates and CVs of the demands. Raises `InvalidInput` if none has a rate."""
    rate_rps = sum(one.rate_rps for one in demands)
    if rate_rps <= 0:
        raise InvalidInput("no model has a rate; give rates, or a history of requests")
    models = tuple(HostedModel(one.model, one.model, one.slo_s, one.rate_rps, one.cv) for one in demands)
    kinds = SharedFleet(1, 0.0, 1, models, {one.model: {} for one in demands})
    duration_s = min(max(_TOLD_REQUESTS / rate_rps, _SHORTEST_S), _LONGEST_S)
    return future(kinds, duration_s, seed, Drift(0.0, 0.0))


def build_shared_book(inputs: SharedInputs, clock: Clock, occasion: str = "") -> SharedPlanBook:
    """Search every number of instances, the largest first, the time being shared out equally.

    What runs with more instances, less the groups that have no devices any more, stays unless the search finds
    something that is better by half a point: a change moves weights. The same holds for the incumbent. Raises
    `Infeasible` naming every model that the whole fleet cannot serve.
    """
    whole = inputs.problem(inputs.cluster.most[0])
    require_feasible(whole.fleet)
    rehearse(whole)
    plans, larger = [], None
    for instances in range(inputs.cluster.most[0], 0, -1):
        plan, larger = _plan(inputs, instances, larger, clock)
        plans.append(plan)
    specs = tuple(replace(one.costs.spec, name=one.name) for one in inputs.tenants)
    speeds = speeds_of([plan.deployment for plan in plans], inputs.tenants, inputs.memory_bytes)
    empty = SharedPlan(ClusterState(()), None, "there is no instance")
    return SharedPlanBook(
        specs,
        inputs.cluster,
        POLICY,
        (empty, *reversed(plans)),
        tuple(speeds),
        tuple(one.demand for one in inputs.tenants),
        occasion,
    )


def attained(problem: Problem, placement: Placement) -> tuple[float, tuple[float, ...]]:
    """Share of requests in time, of all and by model (1 for a model that nobody asks for), without both ends."""
    arrivals = problem.arrivals
    outcome = replay(problem.tables, placement, arrivals)
    begin, end = arrivals.trimmed(TRIM_S)
    asked, good = arrivals.models[begin:end], outcome.good[begin:end]
    counts, met = (np.bincount(one, minlength=len(problem.fleet.models)) for one in (asked, asked[good]))
    by_model = (float(one / count) if count else 1.0 for one, count in zip(met, counts, strict=True))
    return float(good.mean()), tuple(by_model)


def _plan(
    inputs: SharedInputs, instances: int, larger: Placement | None, clock: Clock
) -> tuple[SharedPlan, Placement]:  # fmt: skip
    """The plan for so many instances, and its placement."""
    problem = inputs.problem(instances)
    state = ClusterState.of({inputs.cluster.types[0].name: instances})
    found = search(problem, clock, inputs.budget_s / inputs.cluster.most[0], inputs.seed).placement
    placement, why = _completed(problem, found), "the best that was found"
    enough = attained(problem, placement)[0] - _KEEP
    for words, other in _familiar(inputs, problem, state, larger):
        complete = _completed(problem, other)
        # An idle device, or a model without a place, is a replica less for when an instance is lost.
        as_full = other.devices >= placement.devices and len(_hosted(complete)) >= len(_hosted(placement))
        if as_full and attained(problem, complete)[0] >= enough:
            placement, why = complete, words
            break
    deployment = deployment_of(placement, inputs.tenants, inputs.memory_bytes)
    share, by_model = attained(problem, placement)
    forecast = Forecast(share, max(share, bound(problem).attainment), by_model)
    return SharedPlan(state, deployment, _reason(inputs, forecast, why, deployment), forecast), placement


def _familiar(
    inputs: SharedInputs, problem: Problem, state: ClusterState, larger: Placement | None
) -> Iterator[tuple[str, Placement]]:  # fmt: skip
    """Placements that less has to be moved for, those that serve now first."""
    names = [one.name for one in inputs.tenants]
    if state in inputs.incumbent:
        before = placement_of(inputs.incumbent[state], names)
        if not breaches(problem.fleet, before):
            yield "as before", before
    if larger is not None:
        yield "what is left of the groups of one instance more", _shrunk(problem, larger)


def _completed(problem: Problem, placement: Placement) -> Placement:
    """The placement with a place for every model that fits beside the others at less than half a point altogether:
    a model without one is answered to by nobody, however rarely it is asked for.
    """
    enough = attained(problem, placement)[0] - _KEEP
    for model in sorted(set(range(len(problem.fleet.models))) - _hosted(placement)):
        with_it = [
            one
            for number, group in enumerate(placement.groups)
            for more in [replace(group, models=(*group.models, model))]
            for one in [Placement((*placement.groups[:number], more, *placement.groups[number + 1 :]))]
            if not breaches(problem.fleet, one)
        ]
        best = max(with_it, key=lambda one: attained(problem, one)[0], default=placement)
        placement = best if attained(problem, best)[0] >= enough else placement
    return placement


def _hosted(placement: Placement) -> set[int]:
    return {model for group in placement.groups for model in group.models}


def _shrunk(problem: Problem, placement: Placement) -> Placement:
    """The placement without as many groups as have no devices, one by one those that are missed least."""
    while placement.devices > problem.fleet.devices:
        rest = [
            Placement(placement.groups[:number] + placement.groups[number + 1 :])
            for number in range(len(placement.groups))
        ]
        placement = max(rest, key=lambda one: attained(problem, one)[0])
    return placement


def _reason(inputs: SharedInputs, forecast: Forecast, why: str, deployment: Deployment | None) -> str:
    if deployment is None:
        return "no model fits on so few devices"
    each = ", ".join(
        f"{one.name} {share:.1%}" for one, share in zip(inputs.tenants, forecast.by_model, strict=True)
    )  # fmt: skip
    hosted = set(deployment.models)
    absent = [one.name for one in inputs.tenants if one.name not in hosted]
    without = f"; no place for {', '.join(absent)}" if absent else ""
    return f"{why}: {forecast.attainment:.1%} in time ({each}), no placement above {forecast.bound:.1%}{without}"
