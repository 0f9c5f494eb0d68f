"""Costs of continuous batching from SpotServe's published profile: the profile everybody is charged by.

A prompt is 512 tokens and an output 128, as profiled. Stages work on different steps at the same time:
a step goes through all of them, and only the slowest holds the others up. A group of prompts is charged
what the published formula charges (ASPLOS'24, §4, in the form of its artifact) with one micro-batch for
each, which is what its own optimizer chooses. Between measured batch sizes times are interpolated
linearly; beyond the largest nothing is assumed, so a stage never has more sequences than were measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt

from data.placement import Shape
from planning.edge_weights import GptShape
from planning.static_batch import OUTPUT_TOKENS, StaticBatchProfile

Array = npt.NDArray[np.float64]
Cells = npt.NDArray[np.bool_]

INPUT_TOKENS = 512
MOST_GROUP = 4  # prompts prefilled together, as in the published runs
FINE_SHARDS = 16
_FP32 = 4


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one replica: between two tokens by running requests; of a group of prompts by its size,
    through all stages and on the slowest.
    """

    decode_s: Array
    through_s: Array
    slowest_s: Array

    @property
    def room(self) -> int:
        """Most requests that may run at once."""
        return len(self.decode_s) - 1


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes: weights of one decoder layer, embeddings (whole, on every device), and KV of one whole request."""

    layer: float
    embedding: float
    kv: float

    @classmethod
    def published(cls, model: GptShape) -> Sizes:
        """A GPT in fp32, its requests as profiled."""
        hidden = model.hidden
        return cls(
            layer=_FP32 * (12 * hidden**2 + 13 * hidden),
            embedding=_FP32 * (2 * model.vocab + model.max_seq) * hidden,
            kv=2 * _FP32 * model.layers * hidden * (INPUT_TOKENS + OUTPUT_TOKENS),
        )


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Times and bytes of `model` on instances of `gpus` devices with `memory_bytes` each, `link_bytes_per_s` between.

    `reserve_bytes` of every device are for contexts, libraries and activations. Without `sizes` the model is
    a GPT in fp32. With `plain_prefill` a group of prompts takes as long as one after the other would, without the
    published division.
    """

    profile: StaticBatchProfile
    model: GptShape
    gpus: int = 4
    memory_bytes: float = 16e9
    reserve_bytes: float = 1.5e9
    link_bytes_per_s: float = 50e9 / 8
    plain_prefill: bool = False
    sizes: Sizes | None = None

    def shapes(self) -> list[Shape]:
        """Shapes that fill whole instances and fit with at least one request."""
        sizes = [shards for shards in (1, 2, 4, 8, 16) if shards <= self.profile.most_shards]
        stages = range(1, self.profile.computed_layers + 1)
        found = [Shape(shards=wide, stages=deep) for wide in sizes for deep in stages if deep * wide <= 48]
        return [
            one
            for one in found
            if one.devices % self.gpus == 0 and one.devices >= self.profile.least_devices and self.room(one) > 0
        ]

    def times(self, shape: Shape, room: int | None = None) -> StepTimes:
        """Step times for up to `room` requests (default: as many as fit)."""
        most = min(self.room(shape), room or self.room(shape))
        deep, factor, profile = shape.stages, self.profile.factor, self.profile
        layers = ceil(profile.computed_layers / deep)
        decode = np.zeros(most + 1)
        for running in range(1, most + 1):
            stage = self._layer_ms(shape.shards, ceil(running / deep), 1) * layers
            decode[running] = factor * (stage * deep + profile.decode_hop_ms * (deep - 1)) / 1e3
        through, slowest = np.zeros(MOST_GROUP + 1), np.zeros(MOST_GROUP + 1)
        for group in range(1, MOST_GROUP + 1):
            stage = self._layer_ms(shape.shards, 1, 0) * layers
            share = 1 if self.plain_prefill else group
            rounds = (deep + group - 1) / share
            embed = 2 * profile.embed_ms[1]
            through[group] = factor * (stage * rounds + profile.prefill_hop_ms / share * (deep - 1) + embed) / 1e3
            slowest[group] = factor * (stage * group / share + embed) / 1e3
        return StepTimes(decode, through, slowest)

    def room(self, shape: Shape) -> int:
        """Requests that a replica can run: by memory, and by the batches that were measured."""
        left = self.memory_bytes - self.reserve_bytes - self._fullest_bytes(shape)
        per_request = self.kv_bytes / shape.devices
        measured = max(batch for shards, batch in self.profile.layer_ms if shards == shape.shards)
        return max(min(int(left / per_request), measured * shape.stages), 0)

    @property
    def kv_bytes(self) -> float:
        """KV of one whole request over all devices."""
        return self._sizes.kv

    @property
    def cell_bytes(self) -> float:
        """One layer's share of `FINE_SHARDS`."""
        return self._sizes.layer / FINE_SHARDS

    @property
    def instance_bytes(self) -> float:
        """Memory of an instance for layers and KV: embeddings are on every device, as published."""
        return self.gpus * (self.memory_bytes - self.reserve_bytes - self.embedding_bytes)

    @property
    def embedding_bytes(self) -> float:
        """What an instance has to receive once, whatever its role; inside it is copied."""
        return self._sizes.embedding

    def roles(self, shape: Shape) -> list[Cells]:
        """What each instance of a replica holds: [layer, fine shard] of its devices together."""
        return [role.copy() for role in _roles(self.model.layers, self.gpus, shape)]

    def least_s(self, shape: Shape) -> float:
        """Nothing can be faster on this shape: the quickest group of prompts, then the quickest steps.

        Some measured times are smaller for larger batches, so a request alone is not the least.
        """
        times = self.times(shape)
        return float(times.through_s[1:].min() + OUTPUT_TOKENS * times.decode_s[1:].min())

    def _fullest_bytes(self, shape: Shape) -> float:
        layers = ceil(self.model.layers / shape.stages)
        return layers * self._sizes.layer / shape.shards + self.embedding_bytes

    @property
    def _sizes(self) -> Sizes:
        return self.sizes or Sizes.published(self.model)

    def _layer_ms(self, shards: int, batch: int, which: int) -> float:
        known = sorted(size for wide, size in self.profile.layer_ms if wide == shards)
        return float(np.interp(batch, known, [self.profile.layer_ms[shards, size][which] for size in known]))


@lru_cache(maxsize=256)
def _roles(layers: int, gpus: int, shape: Shape) -> tuple[Cells, ...]:
    width = FINE_SHARDS // shape.shards
    per_stage = ceil(layers / shape.stages)
    found = []
    for first in range(0, shape.devices, gpus):
        cells = np.zeros((layers, FINE_SHARDS), dtype=np.bool_)
        for rank in range(first, first + gpus):
            stage, shard = divmod(rank, shape.shards)
            cells[stage * per_stage : (stage + 1) * per_stage, shard * width : (shard + 1) * width] = True
        found.append(cells)
    return tuple(found)
