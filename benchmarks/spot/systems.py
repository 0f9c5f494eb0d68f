"""Every system of the comparison as a function of a case: the same profile, trace and arrivals for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from benchmarks.spot.inputs import DISK_BYTES_PER_S, HOSTS, Inputs, Model, Times, with_fallback
from data.availability import AvailabilityTrace
from data.placement import Shape
from planning.simulation.serving import Outcome
from planning.simulation.serving_baselines import (
    pinnable,
    pinned_config,
    simulate_reparallelization,
    simulate_rerouting,
)
from planning.simulation.serving_perennial import Charges, Policy, simulate_perennial
from planning.simulation.serving_spotserve import simulate_spotserve
from planning.spot_policy import Book, pinned_policy, published_policy

FREE = Charges(start_s=0.0, cut_s=0.0, prepare_s=0.0, slowdown=1.0, background=1e3, margin_s=0.0, disk_bytes_per_s=1e15)
SKYSERVE_SHAPES = {
    "6.7B": Shape(shards=4, stages=1),
    "20B": Shape(shards=8, stages=2),
    "30B": Shape(shards=8, stages=2),
}
SKYSERVE_REPLICAS = {"6.7B": 8, "20B": 2, "30B": 2}  # what the published rates need on 8 instances
_MOST_PINNED_DEVICES = 24


@dataclass(frozen=True, slots=True)
class Case:
    """One model on one trace with one arrival process; `book` is our policy for it."""

    model: Model
    trace: AvailabilityTrace
    arrival_s: Times
    book: Book

    @classmethod
    def published(cls, inputs: Inputs, model: str, trace: str) -> Case:
        """A panel of the paper."""
        one = inputs.models[model]
        return cls(one, inputs.traces[trace], one.arrival_s, inputs.book(model))


def spotserve(case: Case, *, fill: bool) -> Outcome:
    """As published; `fill` is the old batching."""
    return simulate_spotserve(case.model.fleet, case.trace, case.arrival_s, case.model.required_rps, fill=fill)


def reparallelization(case: Case, *, fill: bool) -> Outcome:
    """Restart everything at every change."""
    model = case.model
    return simulate_reparallelization(model.fleet, case.trace, case.arrival_s, model.required_rps, fill=fill)


def rerouting(case: Case, *, fill: bool) -> Outcome:
    """Pinned as published."""
    pinned = pinned_config(case.model.fleet, HOSTS, case.model.required_rps)
    return simulate_rerouting(case.model.fleet, case.trace, case.arrival_s, pinned, fill=fill)


def rerouting_best(case: Case, *, fill: bool) -> Outcome:
    """Pinned to whatever shape turns out best on this case, and without the artifact's extra sleep."""
    size = case.trace.most * case.model.fleet.gpus_per_host
    outcomes = [
        simulate_rerouting(case.model.fleet, case.trace, case.arrival_s, config, fill=fill, as_published=False)
        for config in pinnable(case.model.fleet, HOSTS)
        if config.stages * config.shards <= min(size, _MOST_PINNED_DEVICES) and config.shards >= 4
    ]
    return min(outcomes, key=lambda outcome: outcome.summary().p99_s)


def skyserve(case: Case) -> Outcome:
    """Replicas of one shape, one more than needed, on-demand stand-ins, weights from disk, nothing migrates.

    Its engines batch continuously, as those that it is used with do.
    """
    shape, wanted = SKYSERVE_SHAPES[case.model.name], SKYSERVE_REPLICAS[case.model.name] + 1
    each = shape.devices // case.model.costs.gpus
    trace, hired_s = with_fallback(case.trace, wanted * each)
    loading = DISK_BYTES_PER_S / case.model.costs.link_bytes_per_s
    charges = Charges(cut_s=0.0, slowdown=1.0, background=loading, arranger=False, residency=False)
    policy = pinned_policy(shape, case.model.costs.gpus, wanted)
    outcome = simulate_perennial(case.model.costs, trace, case.arrival_s, policy, charges)
    return replace(outcome, usd=hired_s)


def perennial(case: Case, charges: Charges | None = None, policy: Policy | None = None) -> Outcome:
    """Ours."""
    return simulate_perennial(case.model.costs, case.trace, case.arrival_s, policy or case.book.target, charges)


def perennial_mixed(case: Case) -> Outcome:
    """Ours with on-demand instances for missing spot ones, but none too many."""
    shape, wanted = SKYSERVE_SHAPES[case.model.name], SKYSERVE_REPLICAS[case.model.name]
    trace, hired_s = with_fallback(case.trace, wanted * shape.devices // case.model.costs.gpus)
    return replace(perennial(replace(case, trace=trace)), usd=hired_s)


def oracle(case: Case) -> Outcome:
    """Ours with transitions that cost nothing and take no time: what no system of this design can beat."""
    return perennial(case, FREE)


def ablations(case: Case) -> Mapping[str, Callable[[], Outcome]]:
    """Each part taken away in turn."""
    published = published_policy(case.model.fleet.profile, case.model.required_rps)
    return {
        "everything": lambda: perennial(case),
        "no policy (SpotServe's choice)": lambda: perennial(case, policy=published),
        "no mapping (rank order)": lambda: perennial(case, Charges(mapping=False)),
        "no arranger (stop early, compute again)": lambda: perennial(case, Charges(arranger=False)),
        "no continuous batching": lambda: perennial(case, Charges(continuous=False)),
        "no residency": lambda: perennial(case, Charges(residency=False)),
    }
