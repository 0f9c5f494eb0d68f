"""The search for the parallel configuration of one number of devices, by one of two policies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal, get_args

from data.errors import InvalidInput
from data.explanation import Candidate, Estimate
from data.layout import ParallelConfig
from data.placement import Shape
from data.plan import Objective
from planning.costs import CostModel
from planning.queueing import late_share, waiting_s
from planning.static_batch import first_best
from planning.uneven import quickest_partition

Momentary = Literal["perennial", "spotserve"]

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


def choose(costs: CostModel, devices: int, objective: Objective, limits: Limits, policy: Momentary) -> Choice:
    """The best configuration for at most `devices` devices.

    `perennial`: any stages and shards; the smallest predicted latency including queueing among
    those that sustain the required rate (with an SLO: the fewest devices that keep it), else the
    largest throughput; fewest devices among equals; at last uneven stages where they are quicker.
    `spotserve`: Algorithm 1 of SpotServe (ASPLOS'24) on this cost model: stages divide the layers,
    shards and batches are powers of two, all devices are used, the first of equals wins.
    """
    if policy not in get_args(Momentary):
        raise InvalidInput(f"policy {policy} is not one of {', '.join(get_args(Momentary))}")
    return Search(costs, objective, limits).choose(devices, policy)


class Search:
    """Evaluates configurations, each (stages, shards) shape and each configuration once."""

    def __init__(self, costs: CostModel, objective: Objective, limits: Limits) -> None:
        self._costs = costs
        self._objective = objective
        self._limits = limits
        self._tokens = limits.tokens_per_request or objective.input_tokens + objective.output_tokens
        self._known: dict[tuple[int, int], list[_Batch]] = {}
        self._rated: dict[ParallelConfig, Candidate] = {}

    def choose(self, devices: int, policy: Momentary) -> Choice:
        """`choose` with what this search knows already."""
        published = policy == "spotserve"
        fitting = self.spotserve(devices) if published else self.perennial(devices)
        if not fitting:
            return Choice(None, None, self.explain_misfit(devices))
        best, met = _published_best(fitting, self._objective) if published else _best(fitting, self._objective)
        best = best if published else self._uneven(best)
        reason = _reason(best, met, fitting, self._objective, devices)
        frontier = tuple(replace(one, estimate=self._with_residency(one)) for one in _frontier(best, fitting))
        return Choice(best.config, self._with_residency(best), reason, frontier)

    def perennial(self, devices: int) -> list[Candidate]:
        """Every configuration that fits, with its latency at the required rate."""
        return [
            self._at_rate(ParallelConfig(replicas, stages, shards, one.requests), one)
            for stages, shards in self._shapes(devices)
            for one in self._batches(stages, shards)
            for replicas in range(1, devices // (stages * shards) + 1)
        ]

    def largest_batches(self, devices: int) -> list[Candidate]:
        """As `perennial`, of each shape with the largest batch limit that fits alone."""
        return [
            replace(one, estimate=self._with_residency(one))
            for stages, shards in self._shapes(devices)
            for batch in self._batches(stages, shards)[-1:]
            for replicas in range(1, devices // (stages * shards) + 1)
            for one in [self._at_rate(ParallelConfig(replicas, stages, shards, batch.requests), batch)]
        ]

    def late_share(self, config: ParallelConfig) -> float:
        """Share of the requests that miss the objective's limit, while the rate is sustained; 0 without a limit."""
        wanted, table = self._objective, self._batches(config.stages, config.shards)[-1].latency_s
        if wanted.slo_s is None:
            return 0.0
        service_s, servers = self._settled_s(config, table), config.replicas * config.max_batch
        cv = self._limits.arrival_cv
        left_s = wanted.slo_s - service_s
        return late_share(wanted.required_rps, table[config.max_batch], servers, left_s, arrival_cv=cv)

    def spotserve(self, devices: int) -> list[Candidate]:
        """Configurations in the published order of enumeration, with the latency of a full batch."""
        shapes = [(p, t) for p, t in self._shapes(devices) if self._costs.spec.layers % p == 0 and not t & (t - 1)]
        found = []
        for stages, shards in sorted(shapes, key=lambda shape: (shape[1], shape[0])):
            for one in self._batches(stages, shards):
                config = ParallelConfig(devices // (stages * shards), stages, shards, one.requests)
                latency_s = one.latency_s[one.requests]
                throughput = config.replicas * one.requests / latency_s
                found.append(Candidate(config, Estimate(latency_s, throughput, one.memory_bytes)))
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

    def _batches(self, stages: int, shards: int) -> list[_Batch]:
        """Batch limits (powers of two) that fit, smallest first."""
        if (stages, shards) not in self._known:
            sizes = [1 << power for power in range(self._limits.most_batch.bit_length())]
            memory = {size: self._memory(stages, shards, size) for size in sizes}
            fitting = [size for size in sizes if memory[size] <= self._limits.memory_bytes]
            table = self._latencies(ParallelConfig(1, stages, shards, fitting[-1])) if fitting else {}
            self._known[stages, shards] = [_Batch(size, memory[size], table) for size in fitting]
        return self._known[stages, shards]

    def _memory(self, stages: int, shards: int, batch: int) -> int:
        return self._costs.memory_bytes(ParallelConfig(1, stages, shards, batch), self._tokens)

    def _latencies(self, config: ParallelConfig) -> dict[int, float]:
        wanted = self._objective
        return {
            batch: self._costs.request_latency_s(config, batch, wanted.input_tokens, wanted.output_tokens)
            for batch in _occupancies(config.max_batch)
        }

    def _at_rate(self, config: ParallelConfig, batch: _Batch) -> Candidate:
        """Latency at the occupancy that the required rate settles at, plus the wait for a place in a batch."""
        if config not in self._rated:
            rate, service_s = self._objective.required_rps, batch.latency_s[batch.requests]
            servers = config.replicas * batch.requests
            wait_s = waiting_s(rate, service_s, servers, arrival_cv=self._limits.arrival_cv)
            latency_s = self._settled_s(config, batch.latency_s) + (wait_s if wait_s < inf else 0.0)
            self._rated[config] = Candidate(config, Estimate(latency_s, servers / service_s, batch.memory_bytes))
        return self._rated[config]

    def _uneven(self, best: Candidate) -> Candidate:
        """The same configuration with the quickest partition, if that fits and serves quicker."""
        config, wanted = best.config, self._objective
        context = wanted.input_tokens + wanted.output_tokens // 2
        partition = quickest_partition(self._costs, Shape(config.shards, config.stages), config.max_batch, context)
        uneven = replace(config, partition=partition)
        memory_bytes = self._costs.memory_bytes(replace(uneven, replicas=1), self._tokens)
        if not partition or memory_bytes > self._limits.memory_bytes:
            return best
        table = self._latencies(replace(uneven, replicas=1))
        found = self._at_rate(uneven, _Batch(config.max_batch, memory_bytes, table))
        return min(best, found, key=lambda one: one.estimate.latency_s)

    def _settled_s(self, config: ParallelConfig, table: Mapping[int, float]) -> float:
        """Seconds in service where as many requests are in service as the required rate brings there."""
        rate, full = self._objective.required_rps, config.max_batch
        settled = (batch for batch in table if batch <= full and config.replicas * batch / table[batch] >= rate)
        return table[next(settled, full)]

    def _with_residency(self, one: Candidate) -> Estimate:
        """What a device has memory for beside its KV."""
        whole = self._costs.memory_bytes(replace(one.config, replicas=1), self._tokens, whole=True)
        return replace(one.estimate, residency="model" if whole <= self._limits.memory_bytes else "shard")


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch limit that fits, its memory, and the latency by requests in service, up to the largest that fits."""

    requests: int
    memory_bytes: int
    latency_s: Mapping[int, float]


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
    return compared(kept)


def compared(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The same candidates; each that another one beats in everything names it."""
    return tuple(replace(one, dominated_by=_dominator(one, candidates)) for one in candidates)


def _dominator(one: Candidate, others: Sequence[Candidate]) -> str:
    mine = one.estimate
    for other in others:
        theirs = other.estimate
        no_worse = theirs.latency_s <= mine.latency_s and theirs.throughput_rps >= mine.throughput_rps
        if no_worse and other.config.devices <= one.config.devices and theirs != mine:
            return str(other.config)
    return ""
