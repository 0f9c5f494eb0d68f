"""A place of the model with random weights of the true shapes: what is timed needs no checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from data.models import ModelSpec
from profiling.campaign import Campaign
from profiling.grid import StepPoint
from serving.engine.batch import SequenceStep, StepPlan
from serving.engine.blocks import blocks_for
from serving.engine.kv_cache import KvCache
from serving.engine.model import ShardModel
from serving.engine.place import Communicator, Place
from serving.requests import Sampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_shard(
    campaign: Campaign, layers: int, comm: Communicator, device: torch.device, *, first: bool, last: bool
) -> ShardModel:
    """The model part of shard `comm.rank` with `layers` decoder layers, an embedding or a head."""
    spec = replace(ModelSpec.from_json(campaign.model), layers=max(layers, 1))
    place = Place((0, layers), comm.rank, comm.size, first=first, last=last)
    dtype = DTYPES[campaign.dtype]
    cache = KvCache(
        place.layers,
        place.kv_heads(spec),
        spec.head_dim,
        blocks=_blocks(campaign),
        block_tokens=campaign.block_tokens,
        dtype=dtype,
        device=device,
    )
    return ShardModel(
        spec, place, _random_weights(spec, place, dtype, device), numerics=campaign.numerics, comm=comm, cache=cache
    )


def plan_for(point: StepPoint, spec: ModelSpec, block_tokens: int, *, sampled: bool) -> StepPlan:
    """A step of `point.batch` sequences, `point.tokens` new tokens each after `point.context` cached ones."""
    per_sequence = blocks_for(point.context + point.tokens, block_tokens)
    return StepPlan(
        0,
        [
            SequenceStep(
                key=key,
                start=point.context,
                tokens=[(key * 31 + index) % spec.vocab for index in range(point.tokens)],
                blocks=list(range(key * per_sequence, (key + 1) * per_sequence)),
                sampling=Sampling() if sampled else None,
                output_index=0,
            )
            for key in range(point.batch)
        ],
    )


def random_hidden(model: ShardModel, point: StepPoint, spec: ModelSpec, device: torch.device) -> Tensor:
    """Activations of the right shape, the same on every shard."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(point.batch * point.tokens, spec.hidden, generator=generator)
    return rows.to(device=device, dtype=model.hidden_dtype)


def _blocks(campaign: Campaign) -> int:
    grid = campaign.grid
    sequences = max(*grid.batches, *grid.prefill_batches)
    return blocks_for(grid.most_tokens, campaign.block_tokens) + sequences


def _random_weights(spec: ModelSpec, place: Place, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = {}
    for tensor, start, stop in place.boxes(spec):
        shape = [high - low for low, high in zip(start, stop, strict=True)]
        weights[tensor.name] = torch.randn(shape, dtype=dtype, device=device).mul_(tensor.shape[-1] ** -0.5)
    return weights
