"""The plan book: the configuration search run for every state that the fleet can be in."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from data.cluster import ClusterSpec, ClusterState
from data.models import ModelSpec
from data.plan import Objective, Plan, PlanBook
from planning.configs import Choice, Limits, Policy, choose
from planning.costs import CostModel


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
) -> PlanBook:
    """A plan for every state with at least one instance.

    A device may use the memory of the smallest type present: lower `memory_bytes` of the instance
    type to make a model spread over more devices, or give the `(stages, shards)` that are `allowed`.
    """
    choices: dict[ClusterState, Choice] = {}
    for state in cluster.states():
        if state.counts:
            memory = min(kind.memory_bytes for kind in cluster.types if kind.name in dict(state.counts))
            limits = Limits(memory, most_batch, allowed, tokens_per_request, arrival_cv)
            choices[state] = choose(costs, cluster.devices(state), objective, limits, policy)
    plans = tuple(
        Plan(state, choice.config, choice.estimate, choice.reason, choice.frontier, _fewer(state, choices))
        for state, choice in choices.items()
    )
    return PlanBook(spec, cluster, objective, policy, profile_sha256, plans)


def _fewer(state: ClusterState, choices: Mapping[ClusterState, Choice]) -> str:
    """What the loss of one instance of each type leads to."""
    counts = dict(state.counts)
    sentences = []
    for name, count in state.counts:
        smaller = choices.get(ClusterState.of({**counts, name: count - 1}))
        sentences.append(f"one {name} less: {_outcome(choices[state], smaller)}")
    return "; ".join(sentences)


def _outcome(now: Choice, then: Choice | None) -> str:
    if then is None:
        return "nothing is left to serve on"
    if then.config is None or then.estimate is None:
        return "the model no longer fits, streams wait for capacity"
    changed = "stays" if now.config == then.config else "becomes"
    return (
        f"{changed} {then.config}, {then.estimate.latency_s:.3g} s per request, "
        f"{then.estimate.throughput_rps:.3g} req/s"
    )
