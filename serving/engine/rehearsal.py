"""Compiles and loads what steps on a GPU take, before anybody waits for them.

A kernel is compiled when it is first called, for the head counts of that sharding: half a second each, most of it with
the interpreter in hand. In a preparation the layout that serves would feel that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data.layout import ParallelConfig, Position
from data.models import ModelSpec
from serving.engine.graphs import graph_sizes
from serving.engine.kv_cache import KvCache
from serving.engine.model import ShardModel
from serving.engine.place import Place

_SHARDS = (1, 2, 4, 8)
_MOST_ROWS = 64
_BLOCKS = 4


@torch.inference_mode()
def rehearse(spec: ModelSpec, dtype: torch.dtype, device: torch.device, block_tokens: int) -> None:
    """Run one layer of a model, and what moves its KV, as the first of 1, 2, 4 and 8 shards; of these, those it has."""
    small = replace(spec, layers=1)
    for shards in _SHARDS:
        if shards <= spec.kv_heads:
            config = ParallelConfig(1, 1, shards, _MOST_ROWS)
            _rehearse(small, Place.of(small, config, Position(0, 0, 0)), dtype, device, block_tokens)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def _rehearse(spec: ModelSpec, place: Place, dtype: torch.dtype, device: torch.device, block_tokens: int) -> None:
    weights = {
        tensor.name: torch.zeros(
            [high - low for low, high in zip(start, stop, strict=True)], dtype=dtype, device=device
        )
        for tensor, start, stop in place.boxes(spec)
    }
    heads = place.kv_heads(spec)
    cache = KvCache(place.layers, heads, spec.head_dim, _BLOCKS, block_tokens, dtype, device)
    model = ShardModel(spec, place, weights, numerics="native", comm=_Alone(place.shards), cache=cache)
    model.warm(graph_sizes(_MOST_ROWS))
    slots = torch.arange(block_tokens, device=device)
    cache.pack(slots)
    cache.scatter(slots, place.layers, heads, cache.gather(slots, place.layers, heads))
    log = KvCache(place.layers, heads, spec.head_dim, 1, block_tokens, dtype, "cpu", log=True)
    log.upload(slots.cpu(), place.layers, heads, device)
    cache.copy_rows(cache.cells(place.layers, heads), slots, slots + block_tokens, place.layers, heads)


class _Alone:
    """A shard whose peers are not there; shapes are right, values are not."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        return tensor

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        """See `Communicator`."""
        return tensor.new_zeros(*tensor.shape[:-1], sum(sizes))
