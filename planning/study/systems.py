"""Every system of a comparison as a function of a case: the same profile, trace and arrivals for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from data.errors import InvalidInput
from planning.simulation.serving import Outcome, constant
from planning.simulation.serving_baselines import (
    pinnable,
    pinned_config,
    simulate_reparallelization,
    simulate_rerouting,
)
from planning.simulation.serving_perennial import Charges, Policy, simulate_perennial
from planning.simulation.serving_spotserve import simulate_spotserve
from planning.spot_policy import pinned_policy, published_policy
from planning.study.case import DISK_BYTES_PER_S, Case
from planning.study.fleets import with_fallback
from planning.study.mixed import mixed_fleet

FREE = Charges(start_s=0.0, cut_s=0.0, prepare_s=0.0, slowdown=1.0, background=1e3, margin_s=0.0, disk_bytes_per_s=1e15)
_MOST_PINNED_DEVICES = 24
_LEAST_PINNED_SHARDS = 4


@dataclass(frozen=True, slots=True)
class System:
    """What serves: its name in figures, one sentence about it, and its simulation; `Outcome.usd` is what it paid."""

    title: str
    about: str
    run: Callable[[Case], Outcome]


def spotserve(case: Case, *, fill: bool) -> Outcome:
    """As published; `fill` is the old batching."""
    found = simulate_spotserve(case.model.fleet, case.trace, case.arrival_s, case.model.required_rps, fill=fill)
    return replace(found, usd=case.spot_usd)


def reparallelization(case: Case, *, fill: bool) -> Outcome:
    """Restart everything at every change."""
    model = case.model
    found = simulate_reparallelization(model.fleet, case.trace, case.arrival_s, model.required_rps, fill=fill)
    return replace(found, usd=case.spot_usd)


def rerouting(case: Case, *, fill: bool) -> Outcome:
    """Pinned as published."""
    pinned = pinned_config(case.model.fleet, case.model.hosts, case.model.required_rps)
    found = simulate_rerouting(case.model.fleet, case.trace, case.arrival_s, pinned, fill=fill)
    return replace(found, usd=case.spot_usd)


def rerouting_best(case: Case, *, fill: bool) -> Outcome:
    """Pinned to whatever shape turns out best on this case, and without the artifact's extra sleep."""
    fleet = case.model.fleet
    size = min(case.trace.most * fleet.gpus_per_host, _MOST_PINNED_DEVICES)
    outcomes = [
        simulate_rerouting(fleet, case.trace, case.arrival_s, config, fill=fill, as_published=False)
        for config in pinnable(fleet, case.model.hosts)
        if config.stages * config.shards <= size and config.shards >= min(_LEAST_PINNED_SHARDS, fleet.gpus_per_host)
    ]
    if not outcomes:
        raise InvalidInput(
            f"no pipeline of {case.model.name} fits on the {case.trace.most} instances of {case.trace.name}"
        )
    return replace(min(outcomes, key=lambda outcome: outcome.summary().p99_s), usd=case.spot_usd)


def skyserve(case: Case) -> Outcome:
    """Replicas of one shape, one more than needed, on-demand stand-ins, weights from disk, nothing migrates.

    Its engines batch continuously, as those that it is used with do.
    """
    shape, replicas = case.model.pinned
    wanted = replicas + 1
    each = shape.devices // case.model.costs.gpus
    trace, hired_s = with_fallback(case.trace, wanted * each)
    slower = DISK_BYTES_PER_S / case.model.costs.link_bytes_per_s
    charges = Charges(cut_s=0.0, slowdown=1.0, background=slower, arranger=False, residency=False)
    policy = pinned_policy(shape, case.model.costs.gpus, wanted)
    outcome = simulate_perennial(case.model.costs, trace, case.arrival_s, policy, charges)
    return replace(outcome, usd=case.spot_usd + case.on_demand_usd(hired_s))


def perennial(case: Case, charges: Charges | None = None, policy: Policy | None = None) -> Outcome:
    """Ours."""
    found = simulate_perennial(case.model.costs, case.trace, case.arrival_s, policy or case.book.target, charges)
    return replace(found, usd=case.spot_usd)


def perennial_fallback(case: Case) -> Outcome:
    """Ours with on-demand instances for missing spot ones, but none too many."""
    trace, hired_s = with_fallback(case.trace, case.model.wanted)
    found = perennial(replace(case, trace=trace))
    return replace(found, usd=case.spot_usd + case.on_demand_usd(hired_s))


def perennial_mixed(case: Case) -> Outcome:
    """Ours, deciding too how many instances of each kind to hold. Raises `InvalidInput` without a policy for that."""
    if case.mixing is None:
        raise InvalidInput("how many instances to hold has not been decided for this case; solve `planning.mixing`")
    fleet = mixed_fleet(case.trace, case.mixing)
    found = perennial(replace(case, trace=fleet.trace), policy=case.mixing.target)
    spot_usd = fleet.spot_s / 3600 * case.model.kind.price_spot_usd_h
    return replace(found, usd=spot_usd + case.on_demand_usd(fleet.on_demand_s))


def on_demand(case: Case, instances: int | None = None) -> Outcome:
    """Our engine on on-demand instances that stay: `instances`, or as many as the pinned layout needs."""
    count = instances or case.model.wanted
    found = perennial(replace(case, trace=constant(count, case.trace.duration_s)))
    return replace(found, usd=case.on_demand_usd(count * case.trace.duration_s))


def oracle(case: Case) -> Outcome:
    """Ours with transitions that cost nothing and take no time: what no system of this design can beat."""
    return perennial(case, FREE)


def ablations(case: Case) -> Mapping[str, Callable[[], Outcome]]:
    """Each part taken away in turn."""
    published = published_policy(case.model.fleet.profile, case.model.required_rps, case.model.costs.gpus)
    return {
        "everything": lambda: perennial(case),
        "no policy (SpotServe's choice)": lambda: perennial(case, policy=published),
        "no mapping (rank order)": lambda: perennial(case, Charges(mapping=False)),
        "no arranger (stop early, compute again)": lambda: perennial(case, Charges(arranger=False)),
        "no continuous batching": lambda: perennial(case, Charges(continuous=False)),
        "no residency": lambda: perennial(case, Charges(residency=False)),
    }


def _both(name: str, title: str, about: str, run: Callable[..., Outcome]) -> dict[str, System]:
    """A published system in both of its batching modes."""
    return {
        f"{name}-{mode}": System(f"{title}, {mode} batching", about, partial(run, fill=mode == "old"))
        for mode in ("old", "new")
    }


SYSTEMS: Mapping[str, System] = {
    "perennial": System(
        "Perennial", "plans for the journey, moves requests with their KV, prepares beside the serving", perennial
    ),
    "perennial-mixed": System(
        "Perennial, mixed",
        "the same, deciding how many spot, on-demand and spare instances to hold",
        perennial_mixed,
    ),
    "perennial-fallback": System(
        "Perennial, with on-demand", "as Perennial, on-demand instances for missing spot ones", perennial_fallback
    ),
    "on-demand": System("on demand", "our engine on on-demand instances that stay", on_demand),
    "skyserve": System(
        "SkyServe-like", "one replica more than needed, on-demand stand-ins, weights from disk", skyserve
    ),
    **_both(
        "spotserve", "SpotServe", "as published: its optimizer, its arranger, a restart of every pipeline", spotserve
    ),
    **_both("reparallelization", "Reparallelization", "restarts everything at every change", reparallelization),
    **_both("rerouting", "Rerouting", "pipelines of one shape, as published; new ones load from disk", rerouting),
    **_both("rerouting-best", "Rerouting, best shape", "the same, with the best shape in hindsight", rerouting_best),
    "oracle": System("oracle", "Perennial with transitions that are free", oracle),
}


def system(name: str) -> System:
    """The system of this name. Raises `InvalidInput` listing the known ones."""
    try:
        return SYSTEMS[name]
    except KeyError:
        raise InvalidInput(f"there is no policy {name!r} to simulate; known are {', '.join(SYSTEMS)}") from None
