"""Plans chosen for the journey: what to run in a state is decided with the way there, and with what comes next.

The options are the best few configurations of every number of instances. What one costs per second is the requests
in the system (predicted latency × rate), deadline misses, and rent; what a change costs is what running requests lose
by it. How the fleet goes on is a Markov process, and the policy of least average cost is the book.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from data.cluster import ClusterSpec, ClusterState, InstanceType
from data.errors import InvalidInput
from data.explanation import Candidate, Move
from data.layout import ParallelConfig
from data.plan import Objective, Plan
from planning.availability import Process, steady
from planning.changes import Changes
from planning.charges import Traffic
from planning.configs import Search, compared
from planning.options import NOTHING_S, Option, as_problem, shortlist
from planning.policy import Ints, Matrix, Problem, decide, settled
from planning.simulation.serving_perennial import Charges

JourneyPolicy = Literal["journey", "hysteresis"]

_MOST_OPTIONS = 96
_FRONTIER = 12
_MISS = 10.0  # times the limit that a request which misses it is held to wait
_LEAST_RPS = 1 / 3600  # plans for no requests at all are made for one an hour


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a journey counts on: how instances come and go (default: `mild`), what changes take beside bytes and for
    them, and what an hour of a request's waiting is worth in dollars, beside which rent and traffic are weighed.
    """

    process: Process | None = None
    charges: Charges = field(default_factory=Charges)
    traffic: Traffic = field(default_factory=Traffic)
    waiting_usd_h: float = 20.0

    def __post_init__(self) -> None:
        if not self.waiting_usd_h > 0:
            raise InvalidInput("an hour of waiting must be worth more than nothing; give dollars per hour")


@dataclass(frozen=True, slots=True)
class Journey:
    """The plans of every state, the moves between the options, and what was taken for granted in a sentence."""

    plans: tuple[Plan, ...]
    moves: tuple[Move, ...]
    assumptions: str


def mild(most: int) -> Process:
    """An instance is lost once in eight hours, seldom with others, and a missing one comes back in ten minutes."""
    return steady(most, 1 / (8 * 3600), 1 / 600, along=0.02)


def plan_journey(
    search: Search,
    changes: Changes,
    cluster: ClusterSpec,
    objective: Objective,
    outlook: Outlook,
    policy: JourneyPolicy,
) -> Journey:
    """A plan for every number of instances. Raises `InvalidInput` unless the fleet has one instance type."""
    if len(cluster.types) != 1:
        raise InvalidInput(
            f"policy {policy} plans for one instance type and {cluster.name} has {len(cluster.types)}; "
            "give a fleet of one type, or choose the policy perennial"
        )
    (kind,), (most,) = cluster.types, cluster.most
    process = outlook.process.sized(most) if outlook.process else mild(most)
    rate = max(objective.required_rps, _LEAST_RPS)
    costs = _Costs(search, changes, kind, rate, objective.slo_s, outlook.waiting_usd_h)
    options = shortlist(map(costs.option, search.largest_batches(most * kind.devices)), _MOST_OPTIONS)
    problem = costs.problem(process, options)
    solution = settled(problem, decide(problem, "optimal" if policy == "journey" else "hysteresis"))
    book = _Book(kind, search, options, problem, solution.choice)
    return Journey(
        plans=tuple(book.plan(count) for count in range(1, most + 1)),
        moves=tuple(costs.move(here, there) for here in options for there in options if here != there),
        assumptions=_assumptions(process, outlook, solution.average),
    )


@dataclass(frozen=True, slots=True)
class _Costs:
    """Costs of options and of moves between them, in seconds that requests spend in the system."""

    search: Search
    changes: Changes
    kind: InstanceType
    rate_rps: float
    slo_s: float | None
    waiting_usd_h: float

    def option(self, candidate: Candidate) -> Option[Candidate]:
        config, estimate = candidate.config, candidate.estimate
        instances = self.changes.instances(config)
        price_usd_h = instances * self.kind.price_spot_usd_h
        served = min(estimate.throughput_rps / self.rate_rps, 1.0)
        waiting_s = served * min(estimate.latency_s, NOTHING_S) + (1 - served) * NOTHING_S
        if self.slo_s is not None:
            waiting_s += served * self.search.late_share(config) * _MISS * self.slo_s
        cost = self.rate_rps * waiting_s + price_usd_h / self.waiting_usd_h
        priced = replace(candidate, estimate=replace(estimate, price_usd_h=price_usd_h))
        return Option(priced, (config.stages, config.shards), instances, cost)

    def problem(self, process: Process, options: Sequence[Option[Candidate]]) -> Problem:
        """Running nothing comes first: it costs more than anything else."""
        serving = [one.cost for one in options]
        nothing = max(self.rate_rps * NOTHING_S, 2 * max(serving, default=0.0))
        instances = [0, *(one.instances for one in options)]
        return as_problem(process, instances, [nothing, *serving], self._moving(options))

    def move(self, here: Option[Candidate], there: Option[Candidate]) -> Move:
        return self.changes.between(here.layout.config, there.layout.config, self._running(here))

    def _moving(self, options: Sequence[Option[Candidate]]) -> Matrix:
        moving = np.zeros((len(options) + 1, len(options) + 1))
        for there, new in enumerate(options, 1):
            # Requests that come until then wait half of it on average.
            moving[0, there] = self.rate_rps * self.changes.start_s(new.layout.config) ** 2 / 2
            for here, old in enumerate(options, 1):
                if here != there:
                    move, running = self.move(old, new), self._running(old)
                    waiting_s = self.changes.price_usd(move, running) / self.waiting_usd_h * 3600
                    moving[here, there] = self.changes.cost_s(move, running) + waiting_s
        return moving

    def _running(self, option: Option[Candidate]) -> float:
        """Requests in service (Little's law), at most as many as there is room for."""
        config = option.layout.config
        return min(self.rate_rps * option.layout.estimate.latency_s, config.replicas * config.max_batch)


@dataclass(frozen=True, slots=True)
class _Book:
    """A solved policy, put into plans."""

    kind: InstanceType
    search: Search
    options: Sequence[Option[Candidate]]
    problem: Problem
    choice: Ints

    def plan(self, count: int) -> Plan:
        state = ClusterState.of({self.kind.name: count})
        row = self.choice[count]
        if not row[0]:
            return Plan(state, None, None, self.search.explain_misfit(count * self.kind.devices))
        chosen = self._option(row[0])
        transitions = tuple(
            (self._option(here).layout.config, self._option(there).layout.config)
            for here, there in enumerate(row)
            if here and there != row[0]
        )
        frontier = self._frontier(count, {int(option) for option in row})
        reason = self._reason(count, chosen, transitions)
        return Plan(state, chosen.layout.config, chosen.layout.estimate, reason, frontier, transitions=transitions)

    def _option(self, index: int) -> Option[Candidate]:
        return self.options[index - 1]

    def _frontier(self, count: int, wanted: set[int]) -> tuple[Candidate, ...]:
        """What is chosen with one layout or another in force, and the cheapest others, cheapest first."""
        fitting = [int(index) for index in np.flatnonzero(self.problem.fits[count]) if index]
        ordered = sorted(fitting, key=lambda index: self._option(index).cost)
        others = [index for index in ordered if index not in wanted][: max(_FRONTIER - len(wanted), 0)]
        return compared([self._option(index).layout for index in ordered if index in wanted or index in others])

    def _reason(
        self, count: int, chosen: Option[Candidate], transitions: Sequence[tuple[ParallelConfig, ParallelConfig]]
    ) -> str:
        estimate, spares = chosen.layout.estimate, count - chosen.instances
        fitting = [one for one in self.options if one.instances <= count]
        best = min(fitting, key=lambda one: one.cost)
        words = (
            f"{chosen.layout.config} on {chosen.instances} of {count} instances "
            f"({spares or 'no'} spare{'s' * (spares > 1)}) costs least in the long run, of "
            f"{len(fitting)} options: {estimate.latency_s:.3g} s per request, {estimate.throughput_rps:.3g} req/s"
        )
        if best != chosen:
            words += f"; {best.layout.config} costs less while it runs ({best.layout.estimate.latency_s:.3g} s)"
        staying = sum(now == then for now, then in transitions)
        return f"{words}; {staying} other layouts stay if they run" if staying else words


def _assumptions(process: Process, outlook: Outlook, average: float) -> str:
    lost, come = process.loss_s * 3600, process.gain_s * 3600
    zones, regimes = len(process.zones), len(process.switching)
    source = "" if outlook.process else " (an assumption; give a trace to fit)"
    seen = f"{zones} zone{'s' * (zones > 1)} and {regimes} regime{'s' * (regimes > 1)}{source}"
    return (
        f"each of {process.most} instances is lost {lost:.3g} times an hour and comes {come:.3g} times an hour if it "
        f"is missing, in {seen}; an hour of waiting is worth {outlook.waiting_usd_h:g} dollars; "
        f"{average:.4g} requests are then in the system on average, rent and changes included"
    )
