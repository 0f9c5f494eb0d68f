"""Cells of a cache as a tensor, by plain indexing: what the quick ways of reading and writing are held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.kv_cache import KvCache


def extract(
    cache: KvCache, blocks: Sequence[int], tokens: int, layers: tuple[int, int], heads: tuple[int, int]
) -> Tensor:
    """A copy `[layers, 2, tokens, heads, head_dim]` of the first `tokens` tokens of a block table."""
    slots = torch.from_numpy(cache.slots(blocks, 0, tokens))
    planes = [[_plane(cache, layer, kind, heads)[slots] for kind in range(2)] for layer in range(*layers)]
    return torch.stack([torch.stack(pair) for pair in planes])


def insert(
    cache: KvCache,
    blocks: Sequence[int],
    tokens: int,
    layers: tuple[int, int],
    heads: tuple[int, int],
    data: Tensor,
) -> None:
    """Store what `extract` returned, perhaps of another cache, for the same ranges."""
    slots = torch.from_numpy(cache.slots(blocks, 0, tokens))
    for index, layer in enumerate(range(*layers)):
        for kind in range(2):
            _plane(cache, layer, kind, heads)[slots] = data[index, kind]


def _plane(cache: KvCache, layer: int, kind: int, heads: tuple[int, int]) -> Tensor:
    """K or V of a layer, `[slots, heads, head_dim]`, in place."""
    return cache.cells((layer, layer + 1), heads)[0, kind]
