"""The plan book: what to run in every state that the fleet can be in, by one of four policies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import Literal, get_args

from data.cluster import ClusterSpec, ClusterState
from data.errors import InvalidInput
from data.explanation import Estimate, Move
from data.layout import ParallelConfig
from data.models import ModelSpec
from data.plan import Objective, Plan, PlanBook
from planning.changes import Changes
from planning.configs import Limits, Momentary, Search
from planning.costs import CostModel
from planning.journey import Outlook, plan_journey

Policy = Literal["perennial", "spotserve", "hysteresis", "journey"]


def build_book(
    spec: ModelSpec,
    cluster: ClusterSpec,
    costs: CostModel,
    objective: Objective,
    policy: Policy = "perennial",
    *,
    profile_sha256: str = "",
    most_batch: int = 8,
    allowed: Collection[tuple[int, int]] | None = None,
    tokens_per_request: int | None = None,
    arrival_cv: float = 1.0,
    outlook: Outlook | None = None,
) -> PlanBook:
    """A plan for every state with at least one instance.

    `perennial` and `spotserve` choose the best configuration of each state for itself (`planning.configs`).
    `journey` chooses by state and layout in force for the least average cost over the `outlook`, `hysteresis`
    keeps a layout until another is 5 % better; both need a fleet of one instance type.

    A device may use the memory of the smallest type present: lower `memory_bytes` of the instance
    type to make a model spread over more devices, or give the `(stages, shards)` that are `allowed`.
    """
    if policy not in get_args(Policy):
        raise InvalidInput(f"policy {policy} is not one of {', '.join(get_args(Policy))}")
    outlook = outlook or Outlook()

    def search(memory_bytes: int) -> Search:
        return Search(costs, objective, Limits(memory_bytes, most_batch, allowed, tokens_per_request, arrival_cv))

    book = PlanBook(spec, cluster, objective, policy, profile_sha256, ())
    changes = Changes(costs, cluster.types[0], objective, outlook.charges, outlook.traffic)
    if policy == "journey" or policy == "hysteresis":
        found = plan_journey(search(cluster.types[0].memory_bytes), changes, cluster, objective, outlook, policy)
        book = replace(book, plans=found.plans, moves=found.moves, assumptions=found.assumptions)
    else:
        plans = tuple(_momentary(cluster, policy, cache(search)))
        book = replace(book, plans=plans, moves=tuple(_moves(cluster, plans, changes, objective)))
    return replace(book, plans=tuple(replace(plan, fewer=_fewer(book, plan)) for plan in book.plans))


def _momentary(cluster: ClusterSpec, policy: Momentary, search: Callable[[int], Search]) -> Iterator[Plan]:
    """Each state for itself."""
    for state in cluster.states():
        if state.counts:
            memory_bytes = min(kind.memory_bytes for kind in cluster.types if kind.name in dict(state.counts))
            choice = search(memory_bytes).choose(cluster.devices(state), policy)
            priced = partial(_priced, cluster, state)
            frontier = tuple(replace(one, estimate=priced(one.config, one.estimate)) for one in choice.frontier)
            estimate = priced(choice.config, choice.estimate) if choice.config and choice.estimate else None
            yield Plan(state, choice.config, estimate, choice.reason, frontier)


def _priced(cluster: ClusterSpec, state: ClusterState, config: ParallelConfig, estimate: Estimate) -> Estimate:
    return replace(estimate, price_usd_h=cluster.price_usd_h(state, config.devices))


def _moves(cluster: ClusterSpec, plans: Iterable[Plan], changes: Changes, objective: Objective) -> Iterator[Move]:
    """Between the configurations of neighbouring states; for fleets of several types nothing is predicted."""
    if len(cluster.types) == 1:
        chosen = [plan for plan in plans if plan.config is not None]
        pairs = {(a.config, b.config): a for one, other in pairwise(chosen) for a, b in ((one, other), (other, one))}
        for (now, then), plan in pairs.items():
            if now and then and plan.estimate and now != then:
                room = now.replicas * now.max_batch
                yield changes.between(now, then, min(objective.required_rps * plan.estimate.latency_s, room))


def _fewer(book: PlanBook, plan: Plan) -> str:
    """What the loss of one instance of each type leads to."""
    return "; ".join(loss.words(plan.config) for loss in book.losses(plan))
