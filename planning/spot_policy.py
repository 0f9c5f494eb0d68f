"""The decision problem of a serving fleet: layouts as options, latency as their cost, transitions as charged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.placement import Shape
from planning.availability import Process
from planning.options import NOTHING_S, Option, as_problem, lost_s, shortlist
from planning.policy import Problem, Rule, Solution, decide
from planning.queueing import late_share
from planning.simulation.serving_perennial import MOST_REPLICAS, Charges, Policy, Target
from planning.simulation.serving_steps import Service
from planning.static_batch import OUTPUT_TOKENS, StaticBatchProfile
from planning.step_costs import StepCosts

_REQUESTS = 300
_SEEDS = 3


@dataclass(frozen=True, slots=True)
class Load:
    """Requests per second, the coefficient of variation of the gaps between them, and the latency limit, if any."""

    rate_rps: float
    cv: float
    slo_s: float | None = None


@dataclass(frozen=True, slots=True)
class Layouts:
    """The options: `targets` without the first, which is to run nothing, and seconds of each (mean, P99)."""

    targets: tuple[Target, ...]
    mean_s: tuple[float, ...]
    p99_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Book:
    """A solved policy over layouts: `target` is its lookup, `explain` what it was chosen from.

    `late_rps` are the requests per second beyond the limit with each option, nothing first; empty without a limit.
    """

    layouts: Layouts
    problem: Problem
    solution: Solution
    late_rps: tuple[float, ...] = ()

    def target(self, instances: int, now: Target | None) -> Target | None:
        """What to run on so many instances if `now` runs."""
        count = min(max(instances, 0), len(self.solution.choice) - 1)
        known = now in self.layouts.targets
        option = self.solution.choice[count, self.layouts.targets.index(now) + 1 if known and now is not None else 0]
        return self.layouts.targets[option - 1] if option else None

    def explain(self, instances: int, now: Target | None = None) -> str:
        """One sentence: the choice, its alternatives, and what one instance less means."""
        chosen = self.target(instances, now)
        if chosen is None:
            return f"nothing fits on {instances} instances"
        able = self.problem.fits[instances, 1:]
        others = [one for one, fits in zip(self.layouts.targets, able, strict=True) if fits and one != chosen]
        others.sort(key=lambda one: self.layouts.p99_s[self.layouts.targets.index(one)])
        options = [self._words(one) for one in others]
        fewer = self.target(instances - 1, chosen) if instances else None
        after = "the model no longer fits" if fewer is None else self._words(fewer)
        return f"{self._words(chosen)}; instead of {', '.join(options[:4]) or 'nothing else'}; one less: {after}"

    def _words(self, target: Target) -> str:
        shape, replicas = target
        at = self.layouts.targets.index(target)
        return (
            f"{replicas}×(P{shape.stages}·T{shape.shards}) with a mean of {self.layouts.mean_s[at]:.3g} s "
            f"and a P99 of {self.layouts.p99_s[at]:.3g} s"
        )


def build(
    costs: StepCosts, process: Process, load: Load, rule: Rule = "optimal", charges: Charges | None = None
) -> Book:
    """The policy for one model on a fleet of one instance type."""
    layouts = find_layouts(costs, process.most, load)
    problem = decision_problem(costs, process, load, layouts, charges or Charges())
    late_rps = () if load.slo_s is None else (load.rate_rps, *_late_rps(costs, layouts, load, load.slo_s))
    return Book(layouts, problem, decide(problem, rule), late_rps)


def _late_rps(costs: StepCosts, layouts: Layouts, load: Load, slo_s: float) -> list[float]:
    """Requests per second that are served later than the limit: whose wait leaves too little for their service.

    As in `planning.configs`: the servers of the queue are the seats of full replicas, and who is served shares its
    replica with as many as there are on average (Little's law).
    """
    found = []
    for (shape, replicas), mean_s in zip(layouts.targets, layouts.mean_s, strict=True):
        times = costs.times(shape)
        together = min(max(round(load.rate_rps * mean_s / replicas), 1), times.room)
        service_s = float(times.through_s[1] + OUTPUT_TOKENS * times.decode_s[together])
        full_s, seats = times.room / _capacity(costs, shape), replicas * times.room
        found.append(load.rate_rps * late_share(load.rate_rps, full_s, seats, slo_s - service_s, arrival_cv=load.cv))
    return found


def find_layouts(costs: StepCosts, most: int, load: Load) -> Layouts:
    """The layouts with the smallest P99 for every number of instances, up to `most`."""
    stable = (
        (shape, replicas)
        for shape in costs.shapes()
        for replicas in range(1, min(most * costs.gpus // shape.devices, MOST_REPLICAS) + 1)
        if _stable(costs, shape, replicas, load)
    )
    rated = {target: _rated(costs, *target, load) for target in stable}
    kept = [one.layout for one in shortlist(_option(costs, target, found[1]) for target, found in rated.items())]
    kept += [target for target in _weakest(costs, most) if target not in kept]
    for target in kept:
        rated.setdefault(target, _rated(costs, *target, load))
    return Layouts(tuple(kept), tuple(rated[one][0] for one in kept), tuple(rated[one][1] for one in kept))


def _option(costs: StepCosts, target: Target, cost: float) -> Option[Target]:
    shape, replicas = target
    return Option(target, shape, replicas * shape.devices // costs.gpus, cost)


def _weakest(costs: StepCosts, most: int) -> list[Target]:
    """One replica of every smallest shape: better than nothing where no layout keeps up."""
    shapes = [shape for shape in costs.shapes() if shape.devices <= most * costs.gpus]
    fastest: dict[int, Shape] = {}
    for shape in sorted(shapes, key=lambda one: -_capacity(costs, one)):
        fastest.setdefault(shape.devices, shape)
    return [(fastest[size], 1) for size in sorted(fastest)[:2]]


def _capacity(costs: StepCosts, shape: Shape) -> float:
    """Requests per second of a full replica."""
    times = costs.times(shape)
    return times.room / float(OUTPUT_TOKENS * times.decode_s[-1] + times.room * times.slowest_s[1])


def _stable(costs: StepCosts, shape: Shape, replicas: int, load: Load) -> bool:
    return replicas * _capacity(costs, shape) > load.rate_rps


def _rated(costs: StepCosts, shape: Shape, replicas: int, load: Load) -> tuple[float, float]:
    """Mean and P99 of simulated requests with gamma gaps on a fleet that does not change."""
    found = []
    for seed in range(_SEEDS if load.cv > 0.2 else 1):
        arrival_s = gamma_arrivals(seed, load, _REQUESTS)
        service = Service(arrival_s, replicas)
        times = costs.times(shape)
        for replica in range(replicas):
            service.start(replica, 0.0, times)
        service.advance(float(arrival_s[-1]) + NOTHING_S)
        latency = np.minimum(service.line.done_s - arrival_s, NOTHING_S)
        found.append((float(latency.mean()), float(np.quantile(latency, 0.99))))
    mean, p99 = np.mean(found, axis=0)
    return float(mean), float(p99)


def gamma_arrivals(seed: int, load: Load, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Arrival times with independent gamma gaps of the given rate and true coefficient of variation."""
    shape = 1 / max(load.cv, 1e-3) ** 2
    gaps = np.random.default_rng(seed).gamma(shape, 1 / (shape * load.rate_rps), size=count)
    return np.cumsum(gaps)


def decision_problem(costs: StepCosts, process: Process, load: Load, layouts: Layouts, charges: Charges) -> Problem:
    """Costs in seconds of latency (P99) per second of operation, as many as requests arrive."""
    options = len(layouts.targets) + 1
    needed = [0, *(shape.devices * count // costs.gpus for shape, count in layouts.targets)]
    serving = [load.rate_rps * seconds for seconds in (NOTHING_S, *layouts.p99_s)]
    moving = np.zeros((options, options))
    for here, (old, old_count) in enumerate(layouts.targets, 1):
        running = load.rate_rps * layouts.mean_s[here - 1]
        for there, (new, new_count) in enumerate(layouts.targets, 1):
            if here != there:
                moving[here, there] = _moving(costs, charges, running, (old, old_count), (new, new_count))
    moving[0, 1:] = load.rate_rps * charges.start_s**2
    return as_problem(process, needed, serving, moving)


def _moving(costs: StepCosts, charges: Charges, running: float, old: Target, new: Target) -> float:
    """Seconds that running requests lose: the pause with their KV, and slower steps while weights come."""
    if old[0] == new[0]:
        share = max(old[1] - new[1], 0) / old[1]
        return lost_s(running * share, pause_s=charges.cut_s)
    role = float(costs.roles(new[0])[0].sum()) * costs.cell_bytes
    window_s = charges.prepare_s + role / (costs.link_bytes_per_s * charges.background)
    instances = new[0].devices * new[1] / costs.gpus
    kv_s = running * costs.kv_bytes / (costs.link_bytes_per_s * instances)
    return lost_s(running, pause_s=charges.cut_s + kv_s, prepare_s=window_s, slowdown=charges.slowdown)


def published_policy(profile: StaticBatchProfile, rate_rps: float, gpus: int = 4, most_batch: int = 4) -> Policy:
    """SpotServe's own choice at every event: what `perennial` runs when its policy is taken away."""

    def choose(instances: int, _now: Target | None) -> Target | None:
        chosen = profile.choose(max(instances, 0) * gpus, most_batch, rate_rps)
        return (
            (Shape(shards=chosen.config.shards, stages=chosen.config.stages), chosen.config.replicas)
            if chosen
            else None
        )

    return choose


def pinned_policy(shape: Shape, gpus: int, most: int) -> Policy:
    """As many replicas of one shape as fit, at most `most`."""

    def choose(instances: int, _now: Target | None) -> Target | None:
        count = min(instances * gpus // shape.devices, most)
        return (shape, count) if count > 0 else None

    return choose
