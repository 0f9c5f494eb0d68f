"""How long a step, a request or a transfer takes and how much memory a position needs, from a `Profile`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from typing import Any

import numpy as np
import pyarrow as pa

from data.errors import InvalidInput
from data.layout import ParallelConfig, Position
from data.models import ModelSpec
from data.profile import Profile
from planning.regression import Curve, fit_curve
from planning.resharding import kv_extent, weight_elements

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LinkCost:
    """`latency_s` per message and `seconds_per_byte` beyond it."""

    latency_s: float
    seconds_per_byte: float


@dataclass(frozen=True, slots=True)
class CostModel:
    """Step, request and transfer times of `spec` on the machine that was profiled.

    `curves` are keyed by (phase, part, shards). `reserve_bytes` is kept free on every device for
    what is neither weights, KV nor activations (contexts, libraries, fragmentation).
    """

    spec: ModelSpec
    curves: Mapping[tuple[str, str, int], Curve]
    links: Mapping[str, LinkCost]
    kv_element_bytes: int
    step_tokens: int = 256
    reserve_bytes: int = 0

    @classmethod
    def fit(
        cls, profile: Profile, *, kv_element_bytes: int | None = None, step_tokens: int = 256, reserve_bytes: int = 0
    ) -> CostModel:
        """Fit every measured (phase, part, shards). Raises `InvalidInput` if decoder layers were not measured."""
        grouped: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
        for row in profile.steps.to_pylist():
            grouped[row["phase"], row["part"], row["shards"]].append(row)
        if not all(any(key[:2] == (phase, "layers") for key in grouped) for phase in ("prefill", "decode")):
            raise InvalidInput("the profile lacks prefill or decode times of decoder layers; measure it again")
        return cls(
            spec=profile.model,
            curves={key: _fit_rows(rows) for key, rows in sorted(grouped.items())},
            links=_fit_links(profile.links),
            kv_element_bytes=kv_element_bytes or profile.model.dtype_bytes,
            step_tokens=step_tokens,
            reserve_bytes=reserve_bytes,
        )

    @property
    def most_shards(self) -> int:
        """Largest tensor-parallel degree that times are known for."""
        return max(shards for _, part, shards in self.curves if part == "layers")

    def step_ms(self, phase: str, layers: int, shards: int, batch: int, tokens: int, context: int) -> float:
        """Milliseconds for `layers` decoder layers on `batch` sequences of `tokens` new and `context` cached tokens."""
        return self._part_ms("layers", phase, layers, shards, batch, tokens, context)

    def stage_ms(
        self, phase: str, config: ParallelConfig, stage: int, *, batch: int, tokens: int, context: int
    ) -> float:
        """Milliseconds of one step on one stage: its layers, and the embedding, head and driving where they are."""
        start, stop = config.stage_layers(stage, self.spec.layers)
        total = self.step_ms(phase, stop - start, config.shards, batch, tokens, context)
        if stage == 0:
            total += self._part_ms("embed", phase, 0, config.shards, batch, tokens, 0)
            total += self._part_ms("step", phase, 0, config.shards, batch, tokens, 0)
        if stage == config.stages - 1:
            total += self._part_ms("head", phase, 0, config.shards, batch, tokens, 0)
        return total

    def prefill_s(self, config: ParallelConfig, tokens: int) -> tuple[float, float]:
        """Seconds to prefill one prompt in chunks of `step_tokens`: through all stages, and on the slowest one."""
        chunks = [(start, min(self.step_tokens, tokens - start)) for start in range(0, tokens, self.step_tokens)]
        each = [self._stages_ms("prefill", config, batch=1, tokens=count, context=done) for done, count in chunks]
        stages = [sum(times) for times in zip(*each, strict=True)]
        hops = (config.stages - 1) * sum(self._hop_s(count) for _, count in chunks)
        return sum(stages) / 1e3 + hops, max(stages) / 1e3

    def decode_s(self, config: ParallelConfig, batch: int, context: int) -> float:
        """Seconds between two tokens of each of `batch` requests of one replica.

        The batch is split over as many steps in flight as there are stages; a step waits for all
        stages in turn, and the slowest stage serves every step.
        """
        flights = min(batch, config.stages)
        part = ceil(batch / flights)
        stages = self._stages_ms("decode", config, batch=part, tokens=1, context=context)
        through = sum(stages) / 1e3 + (config.stages - 1) * self._hop_s(part)
        return max(through, flights * max(stages) / 1e3)

    def request_latency_s(self, config: ParallelConfig, batch: int, input_tokens: int, output_tokens: int) -> float:
        """Seconds from start to last token while `batch` requests share the replica.

        Each request also waits on the slowest stage for the prefills of the others.
        """
        through, slowest = self.prefill_s(config, input_tokens)
        decode = self.decode_s(config, batch, input_tokens + output_tokens // 2)
        return through + (batch - 1) * slowest + (output_tokens - 1) * decode

    def throughput(self, config: ParallelConfig, batch: int, input_tokens: int, output_tokens: int) -> float:
        """Requests per second of all replicas with `batch` requests on each (Little's law)."""
        return config.replicas * batch / self.request_latency_s(config, batch, input_tokens, output_tokens)

    def memory_bytes(self, config: ParallelConfig, tokens_per_request: int, *, whole: bool = False) -> int:
        """Bytes that the fullest device needs: weights, KV of a full batch, activations and the reserve.

        With `whole`, the weights are those of the whole model.
        """
        stages: dict[tuple[int, bool, bool], int] = {}  # of each kind one
        for stage in range(config.stages):
            start, stop = config.stage_layers(stage, self.spec.layers)
            stages.setdefault((stop - start, stage == 0, stage == config.stages - 1), stage)
        positions = [Position(0, stage, shard) for stage in stages.values() for shard in range(config.shards)]
        return max(self._position_bytes(config, position, tokens_per_request, whole) for position in positions)

    def transfer_s(self, size_bytes: int, kind: str) -> float:
        """Seconds to move a message over a link kind of `data.profile.LINK_KINDS` (unmeasured: the nearest measured).

        Raises `InvalidInput` if no link was measured at all.
        """
        link = self.links.get(kind) or self.links.get("network") or self.links.get("local")
        if link is None:
            raise InvalidInput("the profile has no link measurements; measure it again")
        return link.latency_s + size_bytes * link.seconds_per_byte

    def _stages_ms(self, phase: str, config: ParallelConfig, *, batch: int, tokens: int, context: int) -> list[float]:
        """`stage_ms` of every stage; stages in the middle with equally many layers are worked out once."""
        known: dict[tuple[int, bool, bool], float] = {}
        times = []
        for stage in range(config.stages):
            start, stop = config.stage_layers(stage, self.spec.layers)
            alike = stop - start, stage == 0, stage == config.stages - 1
            if alike not in known:
                known[alike] = self.stage_ms(phase, config, stage, batch=batch, tokens=tokens, context=context)
            times.append(known[alike])
        return times

    def _position_bytes(self, config: ParallelConfig, position: Position, tokens: int, whole: bool) -> int:
        spec = self.spec
        role = (ParallelConfig(1, 1, 1, 1), Position(0, 0, 0)) if whole else (config, position)
        weights = weight_elements(spec, *role) * spec.dtype_bytes
        cells = kv_extent(spec, config, position).cells
        cache = 2 * spec.head_dim * self.kv_element_bytes * cells * tokens * config.max_batch
        return weights + cache + self._activation_bytes(config, position) + self.reserve_bytes

    def _activation_bytes(self, config: ParallelConfig, position: Position) -> int:
        """Residual, normalised, attention and MLP inputs of one step, and fp32 logits on the last stage."""
        spec = self.spec
        rows = self.step_tokens * (6 * spec.hidden + 3 * ceil(spec.ffn / config.shards))
        logits = config.max_batch * spec.vocab if position.stage == config.stages - 1 else 0
        return rows * self.kv_element_bytes + 4 * logits

    def _hop_s(self, tokens: int) -> float:
        if not self.links:
            return 0.0
        return self.transfer_s(tokens * self.spec.hidden * self.kv_element_bytes, "network")

    def _part_ms(self, part: str, phase: str, layers: int, shards: int, batch: int, tokens: int, context: int) -> float:
        """Between measured shard counts, geometric interpolation; parts that were not measured cost nothing."""
        known = sorted(count for p, q, count in self.curves if (p, q) == (phase, part))
        if not known:
            return 0.0
        below = max((count for count in known if count <= shards), default=known[0])
        above = min((count for count in known if count >= shards), default=None)
        if above is None:
            if part == "layers":
                raise InvalidInput(f"{shards} shards were not measured, only up to {known[-1]}; profile more shards")
            above = below
        point = {"part": part, "layers": layers, "batch": batch, "tokens": tokens, "context": context}
        low, high = (
            self.curves[phase, part, count].at(_features(point), _coordinates(point)) for count in (below, above)
        )
        if below == above or min(low, high) <= 0:
            return low
        share = log2(shards / below) / log2(above / below)
        return float(low ** (1 - share) * high**share)


def holdout_error(profile: Profile, seed: int = 0) -> tuple[float, float]:
    """Median and 90th percentile of the relative error on a quarter of the points, held out of the fit.

    Points are drawn within each (phase, part, shards), at least three of which stay in the fit.
    """
    random = np.random.default_rng(seed)
    grouped: dict[tuple[str, str, int], list[int]] = defaultdict(list)
    rows = profile.steps.to_pylist()
    for index, row in enumerate(rows):
        grouped[row["phase"], row["part"], row["shards"]].append(index)
    held: set[int] = set()
    for indices in grouped.values():
        count = max(min(ceil(len(indices) / 4), len(indices) - 3), 0)
        held |= {int(index) for index in random.choice(indices, size=count, replace=False)}
    if not held:
        raise InvalidInput("the profile has too few points to hold some out; measure more")
    keep = pa.array([index not in held for index in range(len(rows))])
    model = CostModel.fit(replace(profile, steps=profile.steps.filter(keep)))
    errors = [abs(_predict(model, rows[index]) / rows[index]["time_ms"] - 1) for index in sorted(held)]
    return float(np.median(errors)), float(np.quantile(errors, 0.9))


def _predict(model: CostModel, row: Row) -> float:
    curve = model.curves[row["phase"], row["part"], row["shards"]]
    return curve.at(_features(row), _coordinates(row))


def _fit_rows(rows: Sequence[Row]) -> Curve:
    usable = [row for row in rows if row["time_ms"] > 0]
    if not usable:
        return Curve(np.zeros(len(_features(rows[0]))))
    features = np.array([_features(row) for row in usable], dtype=float)
    coordinates = np.array([_coordinates(row) for row in usable])
    return fit_curve(features, coordinates, np.array([row["time_ms"] for row in usable]))


def _features(row: Row) -> tuple[float, ...]:
    """What time grows with: a start, the weights of each layer, sequences, new tokens, and attended pairs."""
    layers, batch, tokens, context = row["layers"], row["batch"], row["tokens"], row["context"]
    rows = batch * tokens
    if row["part"] != "layers":
        return 1.0, batch, rows
    return 1.0, layers, layers * batch, layers * rows, layers * rows * (context + tokens / 2)


def _coordinates(row: Row) -> tuple[float, ...]:
    """Where a point lies among the measured ones, in doublings."""
    return tuple(log2(1 + row[name]) for name in ("layers", "batch", "tokens", "context"))


def _fit_links(table: pa.Table) -> dict[str, LinkCost]:
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in table.to_pylist():
        if row["time_ms"] > 0:
            grouped[row["kind"]].append(row)
    return {kind: _fit_link(rows) for kind, rows in sorted(grouped.items())}


def _fit_link(rows: Sequence[Row]) -> LinkCost:
    features = np.array([(1.0, row["bytes"]) for row in rows])
    values = np.array([row["time_ms"] / 1e3 for row in rows])
    latency, per_byte = fit_curve(features, np.zeros((len(rows), 1)), values).coefficients
    return LinkCost(float(latency), float(per_byte))
