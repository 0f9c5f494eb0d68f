"""The search for the parallel configuration of one number of devices, by one of two policies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal, get_args

from data.errors import InvalidInput
from data.explanation import Candidate, Estimate
from data.layout import ParallelConfig
from data.plan import Objective
from planning.costs import CostModel
from planning.queueing import waiting_s
from planning.static_batch import first_best

Policy = Literal["perennial", "spotserve"]

_FRONTIER = 12


@dataclass(frozen=True, slots=True)
class Limits:
    """What a search may use: memory of one device, requests per replica, and the (stages, shards) it may choose.

    `tokens_per_request` is what the KV cache is sized for (default: the objective's reference
    request); `arrival_cv` is the coefficient of variation of the gaps between arrivals.
    """

    memory_bytes: int
    most_batch: int = 8
    allowed: Collection[tuple[int, int]] | None = None
    tokens_per_request: int | None = None
    arrival_cv: float = 1.0


@dataclass(frozen=True, slots=True)
class Choice:
    """The configuration of choice with its estimate, or neither, why, and what it was chosen from."""

    config: ParallelConfig | None
    estimate: Estimate | None
    reason: str
    frontier: tuple[Candidate, ...] = ()


def choose(costs: CostModel, devices: int, objective: Objective, limits: Limits, policy: Policy) -> Choice:
    """The best configuration for at most `devices` devices.

    `perennial`: any stages and shards; the smallest predicted latency including queueing among
    those that sustain the required rate (with an SLO: the fewest devices that keep it), else the
    largest throughput; fewest devices among equals. `spotserve`: Algorithm 1 of SpotServe
    (ASPLOS'24) on this cost model: stages divide the layers, shards and batches are powers of two,
    all devices are used, the first of equals wins.
    """
    if policy not in get_args(Policy):
        raise InvalidInput(f"policy {policy} is not one of {', '.join(get_args(Policy))}")
    search = _Search(costs, objective, limits)
    fitting = search.spotserve(devices) if policy == "spotserve" else search.perennial(devices)
    if not fitting:
        return Choice(None, None, search.explain_misfit(devices))
    best, met = _published_best(fitting, objective) if policy == "spotserve" else _best(fitting, objective)
    reason = _reason(best, met, fitting, objective, devices)
    return Choice(best.config, best.estimate, reason, _frontier(best, fitting))


class _Search:
    """Evaluates configurations, each (stages, shards) shape once."""

    def __init__(self, costs: CostModel, objective: Objective, limits: Limits) -> None:
        self._costs = costs
        self._objective = objective
        self._limits = limits
        self._tokens = limits.tokens_per_request or objective.input_tokens + objective.output_tokens

    def perennial(self, devices: int) -> list[Candidate]:
        """Every configuration that fits, with its latency at the required rate."""
        return [
            self._at_rate(ParallelConfig(replicas, stages, shards, batch), memory, table)
            for stages, shards in self._shapes(devices)
            for batch, memory, table in self._batches(stages, shards)
            for replicas in range(1, devices // (stages * shards) + 1)
        ]

    def spotserve(self, devices: int) -> list[Candidate]:
        """Configurations in the published order of enumeration, with the latency of a full batch."""
        shapes = [(p, t) for p, t in self._shapes(devices) if self._costs.spec.layers % p == 0 and not t & (t - 1)]
        found = []
        for stages, shards in sorted(shapes, key=lambda shape: (shape[1], shape[0])):
            for batch, memory, table in self._batches(stages, shards):
                config = ParallelConfig(devices // (stages * shards), stages, shards, batch)
                throughput = config.replicas * batch / table[batch]
                found.append(Candidate(config, Estimate(table[batch], throughput, memory)))
        return sorted(found, key=lambda one: (one.config.shards, one.config.max_batch, one.config.stages))

    def explain_misfit(self, devices: int) -> str:
        """One sentence on why nothing fits."""
        shapes = list(self._shapes(devices))
        if not shapes:
            return f"no allowed configuration has at most {devices} devices"
        least = min(self._memory(stages, shards, 1) for stages, shards in shapes)
        return (
            f"{self._costs.spec.name} does not fit on {devices} devices: the smallest share is "
            f"{least / 2**20:.0f} MiB and a device has {self._limits.memory_bytes / 2**20:.0f} MiB"
        )

    def _shapes(self, devices: int) -> Iterator[tuple[int, int]]:
        spec = self._costs.spec
        for shards in range(1, min(spec.heads, self._costs.most_shards, devices) + 1):
            for stages in range(1, min(spec.layers, devices // shards) + 1):
                if self._limits.allowed is None or (stages, shards) in self._limits.allowed:
                    yield stages, shards

    def _batches(self, stages: int, shards: int) -> Iterator[tuple[int, int, dict[int, float]]]:
        """Batch limits (powers of two) that fit, with their memory and the latency by requests in service."""
        fitting = []
        batch = 1
        while batch <= self._limits.most_batch:
            memory = self._memory(stages, shards, batch)
            if memory <= self._limits.memory_bytes:
                fitting.append((batch, memory))
            batch *= 2
        if fitting:
            table = self._latencies(stages, shards, fitting[-1][0])
            yield from ((batch, memory, table) for batch, memory in fitting)

    def _memory(self, stages: int, shards: int, batch: int) -> int:
        return self._costs.memory_bytes(ParallelConfig(1, stages, shards, batch), self._tokens)

    def _latencies(self, stages: int, shards: int, most: int) -> dict[int, float]:
        wanted = self._objective
        config = ParallelConfig(1, stages, shards, most)
        return {
            batch: self._costs.request_latency_s(config, batch, wanted.input_tokens, wanted.output_tokens)
            for batch in _occupancies(most)
        }

    def _at_rate(self, config: ParallelConfig, memory: int, table: dict[int, float]) -> Candidate:
        """Latency at the occupancy that the required rate settles at, plus the wait for a place in a batch."""
        rate, full = self._objective.required_rps, config.max_batch
        capacity = config.replicas * full / table[full]
        settled = (batch for batch in table if batch <= full and config.replicas * batch / table[batch] >= rate)
        latency = table[next(settled, full)]
        wait = waiting_s(rate, table[full], config.replicas * full, arrival_cv=self._limits.arrival_cv)
        return Candidate(config, Estimate(latency + (wait if wait < inf else 0.0), capacity, memory))


def _occupancies(most: int) -> list[int]:
    """1 to 8 one by one, then in steps of a quarter, always with the powers of two."""
    steps = [batch for batch in range(1, most + 1) if batch <= 8 or batch % (1 << (batch.bit_length() - 3)) == 0]
    return steps if steps[-1] == most else [*steps, most]


def _order(one: Candidate) -> tuple[float, int, int, int]:
    """Latency to a microsecond, then fewest devices, fewest stages, smallest batch."""
    return round(one.estimate.latency_s, 6), one.config.devices, one.config.stages, one.config.max_batch


def _best(fitting: Sequence[Candidate], objective: Objective) -> tuple[Candidate, bool]:
    sustaining = [one for one in fitting if _sustains(one, objective)]
    if not sustaining:
        return min(fitting, key=lambda one: (-round(one.estimate.throughput_rps, 9), *_order(one))), False
    slo = objective.slo_s
    kept = [one for one in sustaining if slo is not None and one.estimate.latency_s <= slo]
    if kept:
        return min(kept, key=lambda one: (one.config.devices, *_order(one))), True
    return min(sustaining, key=_order), True


def _sustains(one: Candidate, objective: Objective) -> bool:
    """Strictly above the rate: at full utilisation the queue grows without bound."""
    return one.estimate.throughput_rps > objective.required_rps


def _published_best(fitting: Sequence[Candidate], objective: Objective) -> tuple[Candidate, bool]:
    rated = ((one.estimate.latency_s, one.estimate.throughput_rps, one) for one in fitting)
    chosen = first_best(rated, objective.required_rps)
    if chosen is None:
        raise InvalidInput("nothing to choose from")
    met, best = chosen
    return best, met


def _reason(best: Candidate, met: bool, fitting: Sequence[Candidate], objective: Objective, devices: int) -> str:
    latency, throughput = f"{best.estimate.latency_s:.3g} s", f"{best.estimate.throughput_rps:.3g} req/s"
    rate, of_all = f"{objective.required_rps:g} req/s", f"of {len(fitting)} configurations on up to {devices} devices"
    if not met:
        return f"{best.config} has the largest throughput, {throughput}, {of_all}; none sustains {rate}"
    if objective.slo_s is not None and best.estimate.latency_s <= objective.slo_s:
        kept = f"keeps a request within {objective.slo_s:g} s ({latency}) at {rate}"
        return f"{best.config} {kept} on the fewest devices, {of_all}"
    many = sum(_sustains(one, objective) for one in fitting)
    return f"{best.config} has the smallest latency, {latency}, among the {many} {of_all} that sustain {rate}"


def _frontier(best: Candidate, fitting: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The best candidate of every (stages, shards) shape, fastest first; each dominated one names its better."""
    shapes: dict[tuple[int, int], Candidate] = {(best.config.stages, best.config.shards): best}
    for one in sorted(fitting, key=lambda one: (-one.estimate.throughput_rps, *_order(one))):
        shapes.setdefault((one.config.stages, one.config.shards), one)
    kept = sorted(shapes.values(), key=lambda one: (one != best, *_order(one)))[:_FRONTIER]
    return tuple(replace(one, dominated_by=_dominator(one, kept)) for one in kept)


def _dominator(one: Candidate, others: Sequence[Candidate]) -> str:
    mine = one.estimate
    for other in others:
        theirs = other.estimate
        no_worse = theirs.latency_s <= mine.latency_s and theirs.throughput_rps >= mine.throughput_rps
        if no_worse and other.config.devices <= one.config.devices and theirs != mine:
            return str(other.config)
    return ""
