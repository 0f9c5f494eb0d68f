"""SpotServe's cost model and configuration search for static batches, as published.

X. Miao et al., "SpotServe: Serving Generative Large Language Models on Preemptible Instances",
ASPLOS'24, Algorithm 1 and §4, in the form of its artifact. A batch starts and ends together, with
fixed prompt and output lengths; the artifact's division of an already micro-batched prefill time by
the number of micro-batches is kept, because its published latencies contain it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

from data.errors import CorruptData, InvalidInput

OUTPUT_TOKENS = 128
_SHARDS = (1, 2, 4, 8, 16)

T = TypeVar("T")


def first_best(candidates: Iterable[tuple[float, float, T]], required: float) -> tuple[bool, T] | None:
    """Algorithm 1's choice among `(latency, throughput, candidate)`: the lowest latency that sustains `required`.

    If none does, the highest throughput. The first of equals wins. Returns whether `required` is
    met, and the candidate; None without candidates.
    """
    fast: tuple[float, T] | None = None
    strong: tuple[float, T] | None = None
    for latency, throughput, candidate in candidates:
        if throughput >= required and (fast is None or latency < fast[0]):
            fast = latency, candidate
        if strong is None or throughput > strong[0]:
            strong = throughput, candidate
    if fast is not None:
        return True, fast[1]
    return (False, strong[1]) if strong is not None else None


@dataclass(frozen=True, slots=True)
class StaticConfig:
    """A configuration with `prefill_micro` and `decode_micro` micro-batches per batch."""

    replicas: int
    stages: int
    shards: int
    batch: int
    prefill_micro: int
    decode_micro: int


@dataclass(frozen=True, slots=True)
class StaticChoice:
    """What the search returns: `met` tells which branch of Algorithm 1 fired."""

    config: StaticConfig
    latency_ms: float
    throughput_rps: float
    met: bool


@dataclass(frozen=True, slots=True)
class StaticBatchProfile:
    """Milliseconds per layer by (shards, micro-batch): prefill of the whole prompt, and one decode step."""

    stored_layers: int
    computed_layers: int
    least_devices: int
    most_shards: int
    factor: float
    prefill_hop_ms: float
    decode_hop_ms: float
    embed_ms: Mapping[int, float]
    layer_ms: Mapping[tuple[int, int], tuple[float, float]]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StaticBatchProfile:
        """Read one entry of a `profiles.json`. Raises `CorruptData` on missing fields."""
        try:
            return cls(
                stored_layers=value["stored_layers"],
                computed_layers=value["computed_layers"],
                least_devices=value["min_gpus"],
                most_shards=value["max_M"],
                factor=value["fix"],
                prefill_hop_ms=value["stage_comm_prefill_ms"],
                decode_hop_ms=value["stage_comm_decode_ms"],
                embed_ms={int(batch): time for batch, time in value["embed_ms"].items()},
                layer_ms={
                    (int(shards.removeprefix("M=")), int(batch)): (times[0], times[1])
                    for shards, row in value["layer_ms"].items()
                    for batch, times in row.items()
                },
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptData(f"not a static-batch profile: {error}") from error

    def prefill_ms(self, config: StaticConfig, *, factor: float | None = None) -> float:
        """Prefill of one batch through all stages (t1 in the reference)."""
        micro = config.prefill_micro
        layer = self._layer_ms(config.shards, config.batch // micro)[0]
        time = layer * self._stage_layers(config) * (config.stages + micro - 1) / micro
        return (self.factor if factor is None else factor) * (time + self.prefill_hop_ms / micro * (config.stages - 1))

    def decode_ms(self, config: StaticConfig, *, factor: float | None = None) -> float:
        """One decode step of one batch through all stages (t2 in the reference)."""
        micro = config.decode_micro
        layer = self._layer_ms(config.shards, config.batch // micro)[1]
        time = layer * self._stage_layers(config) * (config.stages + micro - 1)
        return (self.factor if factor is None else factor) * (time + self.decode_hop_ms / micro * (config.stages - 1))

    def latency_ms(self, config: StaticConfig) -> float:
        """Milliseconds from the start of a batch to its last token (l in the reference)."""
        embed = self.factor * 2 * self.embed_ms[config.batch]
        return self.prefill_ms(config) + OUTPUT_TOKENS * self.decode_ms(config) + embed

    def throughput_rps(self, config: StaticConfig) -> float:
        """Requests per second of all replicas with full batches (φ in the reference)."""
        return 1000 * config.replicas * config.batch / self.latency_ms(config)

    def choose(self, devices: int, max_batch: int, required_rps: float) -> StaticChoice | None:
        """Algorithm 1 in the artifact's order of enumeration; None with fewer devices than the model needs."""
        options = [(self.latency_ms(config), self.throughput_rps(config), config)
                   for config in self._candidates(devices, max_batch)]  # fmt: skip
        chosen = first_best(options, required_rps)
        if chosen is None:
            return None
        met, config = chosen
        return StaticChoice(config, self.latency_ms(config), self.throughput_rps(config), met)

    def _candidates(self, devices: int, max_batch: int) -> Iterator[StaticConfig]:
        if devices < self.least_devices:
            return
        for shards in _SHARDS:
            if shards > min(self.most_shards, devices):
                return
            for batch in _powers(max_batch):
                for prefill in _powers(batch):
                    for decode in _powers(batch):
                        for stages in range(ceil(self.least_devices / shards), devices // shards + 1):
                            if stages and self.stored_layers % stages == 0:
                                replicas = devices // (stages * shards)
                                yield StaticConfig(replicas, stages, shards, batch, prefill, decode)

    def _stage_layers(self, config: StaticConfig) -> int:
        return ceil(self.computed_layers / config.stages)

    def _layer_ms(self, shards: int, batch: int) -> tuple[float, float]:
        try:
            return self.layer_ms[shards, batch]
        except KeyError:
            raise InvalidInput(f"{shards} shards with micro-batches of {batch} were not profiled") from None


def _powers(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2
