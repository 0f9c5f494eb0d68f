"""Layers that own their part of the weights: sharded linears, embeddings, attention over the cache."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from data.models import ModelSpec, Unit, unit_range
from serving.engine.kv_cache import KvCache
from serving.engine.native import attend_to_past
from serving.engine.numerics import Linear, Numerics
from serving.engine.place import Place, Rehearsed
from serving.engine.step import DecodeRows, StepTensors

Turn = tuple[Tensor, Tensor]
"""cos and sin `[n, 1, head_dim / 2]` of the rows' positions."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What layers of one place are made from: its weights under their checkpoint names."""

    spec: ModelSpec
    place: Place
    weights: Mapping[str, Tensor]
    numerics: Numerics
    comm: Rehearsed

    def vector(self, name: str) -> Tensor:
        """A weight as it is: a norm's scale, a table of positions."""
        return self.weights[name]

    def column_linear(self, *names: str) -> Linear:
        """Linears with the same input side by side, as one: their outputs are concatenated."""
        weights = [self.weights[f"{name}.weight"] for name in names]
        biases = [self.weights[f"{name}.bias"] for name in names if f"{name}.bias" in self.weights]
        self.comm.rest()
        return self.numerics.column_linear(_side_by_side(weights), _side_by_side(biases) if biases else None)

    def row_linear(self, name: str, unit: Unit) -> Linear:
        """A linear whose input is cut over the shards by `unit`."""
        low, high = self.place.query_heads(self.spec)
        ranges = [unit_range(self.spec, unit, head, self.spec.heads) for head in range(low, high)]
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return self.numerics.row_linear(weight, bias, [stop - start for start, stop in ranges], self.comm)


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # one alone stays the view that it is


class VocabEmbedding:
    """Token embedding, rows cut over the shards."""

    def __init__(self, parts: Parts, name: str) -> None:
        self._table = parts.weights[name]
        self._comm = parts.comm
        self._start, self._stop = unit_range(parts.spec, "vocab", parts.place.shard, parts.place.shards)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Rows `[n, hidden]`: one shard contributes its row, the others exact zeros."""
        if self._comm.size == 1:
            return self._table[tokens]
        own = (tokens >= self._start) & (tokens < self._stop)
        rows = self._table[torch.where(own, tokens - self._start, 0)].masked_fill_(~own[:, None], 0.0)
        return self._comm.all_reduce(rows)


class VocabHead:
    """Logits of sampled rows, vocabulary cut over the shards, gathered on shard 0."""

    def __init__(self, parts: Parts, name: str) -> None:
        spec, place = parts.spec, parts.place
        ranges = (unit_range(spec, "vocab", shard, place.shards) for shard in range(place.shards))
        self._sizes = [stop - start for start, stop in ranges]
        self._linear = parts.numerics.column_linear(parts.weights[name], None)
        self._comm = parts.comm

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """float32 `[n, vocab]` on shard 0, None elsewhere."""
        return self._comm.gather(self._linear(hidden).float(), self._sizes)


class Attention:
    """Attention of the local heads over the paged cache. `served` says by row of heads which KV head it uses."""

    def __init__(self, parts: Parts, cache: KvCache) -> None:
        spec = parts.spec
        self._numerics, self._cache = parts.numerics, cache
        low, high = parts.place.query_heads(spec)
        self.heads, self.kv_heads = high - low, cache.heads[1] - cache.heads[0]
        self.served = [head * spec.kv_heads // spec.heads - cache.heads[0] for head in range(low, high)]
        group = self.heads // self.kv_heads
        even = self.served == [head // group for head in range(self.heads)]
        # Cuts inside a group of query heads leave KV heads with unequal numbers of them: expand then.
        self._expand = None if even else torch.tensor(self.served, device=cache.device)
        self._shape = (self.kv_heads, group, spec.head_dim) if even else (self.heads, 1, spec.head_dim)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn | None, step: StepTensors) -> Tensor:
        """q `[n, heads, head_dim]`, k and v `[n, kv_heads, head_dim]` → `[n, heads · head_dim]`; caches k and v.

        With `turn`, q and k are rotated by it first.
        """
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        self._cache.write(layer, step.slots, *self._numerics.cacheable(k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._attend_groups(layer, q, step, out)
        return out.flatten(1)

    def _attend_groups(self, layer: int, q: Tensor, step: StepTensors, out: Tensor) -> None:
        for group in step.groups:
            keys, values = self._cache.read(layer, group.blocks)
            if self._expand is not None:
                keys, values = keys.index_select(2, self._expand), values.index_select(2, self._expand)
            queries = q.index_select(0, group.rows).view(-1, group.tokens, *self._shape)
            if group.visible is None:
                mixed = attend_to_past(queries, keys[:, : group.context], values[:, : group.context])
            else:
                mixed = self._numerics.attend(queries, keys, values, group.visible)
            out.index_copy_(0, group.rows, mixed.reshape(-1, *q.shape[1:]))


class PagedAttention(Attention):
    """Single rows read the cache in place; rotation and caching are one kernel. Needs `FusedNumerics`."""

    def __init__(self, parts: Parts, cache: KvCache) -> None:
        from serving.engine import attention, fused

        super().__init__(parts, cache)
        self._attend, self._cache_rows = attention.paged_attention, fused.cache_rows
        self._window = parts.spec.sliding_window
        starts = [bisect_left(self.served, head) for head in range(self.kv_heads + 1)]
        self._served = torch.tensor(starts, dtype=torch.int32, device=cache.device)
        self._most_served = max(stop - start for start, stop in pairwise(starts))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, turn: Turn | None, step: StepTensors) -> Tensor:
        """See `Attention`."""
        q = self._cache_rows(q, k, v, turn, step.slots, *self._cache.pages(layer))
        decode = step.decode
        if decode is not None and decode.rows is None:
            return self._read(layer, q, decode).flatten(1)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._attend_groups(layer, q, step, out)
        if decode is not None and decode.rows is not None:
            out.index_copy_(0, decode.rows, self._read(layer, q.index_select(0, decode.rows), decode))
        return out.flatten(1)

    def _read(self, layer: int, q: Tensor, decode: DecodeRows) -> Tensor:
        return self._attend(
            q,
            *self._cache.pages(layer),
            tables=decode.tables,
            lengths=decode.lengths,
            served=self._served,
            most_served=self._most_served,
            window=self._window,
        )


def make_attention(parts: Parts, cache: KvCache) -> Attention:
    """The attention of the local heads that fits the numerics."""
    return PagedAttention(parts, cache) if parts.numerics.paged else Attention(parts, cache)


def rotate(x: Tensor, turn: Turn) -> Tensor:
    """Rotary position embedding in the half-split convention: pairs are (i, i + head_dim / 2).

    x `[n, heads, head_dim]`, cos and sin `[n, 1, head_dim / 2]`.
    """
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
