"""The models of a study: from SpotServe's published profile, or from measurements of one's own.

The simulations know one kind of request, of 512 prompt tokens and 128 output tokens. A measured model gets
times such that such a request stands for one of the lengths asked for: its prefill is that of all prompt tokens, and
each of its 128 steps takes as long as `output_tokens / 128` real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

from data.cluster import InstanceType
from data.errors import InvalidInput
from data.layout import ParallelConfig
from planning.costs import CostModel
from planning.edge_weights import GptShape
from planning.simulation.serving_perennial import Target
from planning.simulation.serving_spotserve import StaticFleet
from planning.spot_policy import Load, find_layouts
from planning.static_batch import OUTPUT_TOKENS, StaticBatchProfile
from planning.step_costs import Sizes, StepCosts
from planning.study.case import Model, loading

REQUIRED = 4 / 3  # the rate that published configurations are chosen for, in arrivals (OPT-6.7B: 2.0 for 1.5)
_SHARDS = (1, 2, 4, 8, 16)
_BATCHES = (1, 2, 4, 8, 16, 32)
_FP32 = 4


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests per second, the CV of the gaps between them, and the lengths that a request has on average."""

    rate_rps: float
    cv: float
    input_tokens: int
    output_tokens: int


def published_model(entry: Mapping[str, Any], kind: InstanceType, load: Load, instances: int) -> Model:
    """A model of `data.catalog.published_profile`. Raises `InvalidInput` for instances it was not profiled on."""
    shape, gpus = entry["model"], int(entry["gpus_per_instance"])
    if kind.devices != gpus or kind.accelerator != "NVIDIA T4":
        raise InvalidInput(f"the published profile is of instances with {gpus} T4, not of {kind.name}; give --profile")
    model = GptShape(shape["layers"], shape["vocab"], shape["hidden"], shape["max_seq"])
    profile = StaticBatchProfile.from_json(entry)
    costs = StepCosts(profile, model)
    published_rps = {float(entry["arrival_rate_rps"]): float(entry["required_rps"])}
    required_rps = published_rps.get(load.rate_rps, load.rate_rps * REQUIRED)
    return _model(shape["name"], kind, StaticFleet(profile, model, gpus), costs, load, required_rps, instances)


def measured_model(costs: CostModel, kind: InstanceType, demand: Demand, instances: int) -> Model:
    """A profiled model on `instances` of a type. Raises `InvalidInput` if no shape of it fits on them."""
    spec, sizes = costs.spec, _sizes(costs, demand)
    equal = GptShape(spec.layers, round(sizes.embedding / (2 * _FP32 * _hidden(sizes))), _hidden(sizes), 0)
    steps = StepCosts(
        as_static_profile(costs, demand),
        equal,
        kind.devices,
        kind.memory_bytes,
        costs.reserve_bytes,
        kind.network_bytes_per_s,
        sizes=sizes,
    )
    able = [shape.devices for shape in steps.shapes() if shape.devices <= instances * kind.devices]
    if not able:
        raise InvalidInput(f"{spec.name} does not fit on {instances} × {kind.name}; take more or larger instances")
    profile = replace(steps.profile, least_devices=min(able))
    steps = replace(steps, profile=profile)
    load, fleet = Load(demand.rate_rps, demand.cv), StaticFleet(profile, equal, kind.devices)
    return _model(spec.name, kind, fleet, steps, load, demand.rate_rps * REQUIRED, instances)


def as_static_profile(costs: CostModel, demand: Demand) -> StaticBatchProfile:
    """Measured times in the form of the published ones: embedding, head and driving are spread over the layers."""
    spec, middle = costs.spec, demand.input_tokens + demand.output_tokens // 2
    known = [shards for shards in _SHARDS if shards <= min(costs.most_shards, spec.heads)]
    stretch = demand.output_tokens / OUTPUT_TOKENS
    table = {}
    for shards in known:
        for batch in _BATCHES:
            whole = ParallelConfig(1, 1, shards, batch)
            prefill = 1e3 * costs.prefill_s(whole, demand.input_tokens)[0] * batch
            decode = costs.stage_ms("decode", whole, 0, batch=batch, tokens=1, context=middle)
            table[shards, batch] = prefill / spec.layers, decode * stretch / spec.layers
    return StaticBatchProfile(
        stored_layers=spec.layers,
        computed_layers=spec.layers,
        least_devices=1,
        most_shards=known[-1],
        factor=1.0,
        prefill_hop_ms=_hop_ms(costs, demand.input_tokens),
        decode_hop_ms=_hop_ms(costs, 1) * stretch,
        embed_ms=dict.fromkeys(_BATCHES, 0.0),
        layer_ms=table,
    )


def _model(
    name: str, kind: InstanceType, fleet: StaticFleet, costs: StepCosts, load: Load, required_rps: float, instances: int
) -> Model:
    pinned = _pinned(costs, load, instances)
    return Model(name, kind, loading(fleet, costs), costs, load.rate_rps, required_rps, pinned, instances)


def _pinned(costs: StepCosts, load: Load, instances: int) -> Target:
    """The layout with the smallest P99 on so many instances."""
    layouts = find_layouts(costs, instances, load)
    if not layouts.targets:
        raise InvalidInput(f"no layout of the model fits on {instances} instances; take more of them")
    return layouts.targets[min(range(len(layouts.targets)), key=lambda index: layouts.p99_s[index])]


def _sizes(costs: CostModel, demand: Demand) -> Sizes:
    spec = costs.spec
    embedding = spec.vocab * spec.hidden * (1 if spec.tied_embeddings else 2) * spec.dtype_bytes
    kv = 2 * costs.kv_element_bytes * spec.layers * spec.kv_heads * spec.head_dim
    tokens = demand.input_tokens + demand.output_tokens
    return Sizes((spec.weight_bytes - embedding) / spec.layers, embedding, kv * tokens)


def _hidden(sizes: Sizes) -> int:
    """Of the GPT in fp32 whose layers have as many bytes: published formulas know no other models."""
    return max(round(sqrt(sizes.layer / (12 * _FP32))), 1)


def _hop_ms(costs: CostModel, tokens: int) -> float:
    if not costs.links:
        return 0.0
    return 1e3 * costs.transfer_s(tokens * costs.spec.hidden * costs.kv_element_bytes, "network")
