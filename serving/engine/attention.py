"""Attention of single rows over the paged cache, read in place: a Triton kernel and its reduction.

Each sequence's context is cut into as many spans as keep the device busy; every program attends to one
span for the query heads of one KV head, and a second kernel combines the spans. Sums are float32.
Import only where Triton is: on CUDA, or on a CPU under its interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_LEAST_ROWS = 16  # of a matrix product on the device
_PROGRAMS = 512  # that keep every multiprocessor of a large device busy until the end
_MOST_SPANS = 64
_SPAN_COUNTS = (4, 16, _MOST_SPANS)  # each is compiled on its own, so there are few
_TILE_BYTES = 16384  # of keys in flight per pipeline stage
_WARPS = 4
_STAGES = 3


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    tables: Tensor,
    lengths: Tensor,
    served: Tensor,
    most_served: int,
    window: int | None,
) -> Tensor:
    """Row i of `q` `[n, heads, head_dim]` attends to the first `lengths[i]` tokens of block table `tables[i]`.

    `keys` and `values` are one layer's `[blocks, block_tokens, kv_heads, head_dim]`; KV head h serves the
    query heads `served[h]` … `served[h + 1] - 1` (int32), at most `most_served` of them. With `window`
    only that many last tokens are seen. Every length is at least 1. Returns `[n, heads, head_dim]`.
    """
    rows, heads, head_dim = q.shape
    kv_heads, block_tokens = keys.shape[2], keys.shape[1]
    spans = spans_for(rows * kv_heads)
    padded = max(16, triton.next_power_of_2(head_dim))
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    partial, scales = out, lengths  # not touched when there is one span
    if spans > 1:
        partial = torch.empty((rows, heads, spans, head_dim), dtype=torch.float32, device=q.device)
        scales = torch.empty((rows, heads, spans), dtype=torch.float32, device=q.device)
    tile = max(16, min(128, triton.next_power_of_2(_TILE_BYTES // (padded * q.element_size()))))
    sizes = {"HEADS": heads, "HEAD_DIM": head_dim, "PADDED": padded, "TILE": tile, "WINDOW": window or 0}
    group = max(_LEAST_ROWS, triton.next_power_of_2(most_served))
    _attend_to_span[(rows, kv_heads, spans)](
        q,
        keys,
        values,
        tables,
        lengths,
        served,
        partial,
        scales,
        q.stride(0),
        tables.stride(0),
        spans,
        math.log2(math.e) / math.sqrt(head_dim),
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK_TOKENS=block_tokens,
        SPLIT=spans > 1,
        **sizes,
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    if spans > 1:
        count = next(count for count in _SPAN_COUNTS if spans <= count)
        _combine_spans[(rows, heads)](partial, scales, lengths, out, spans, COUNT=count, **sizes)
    return out


def spans_for(programs: int) -> int:
    """A power of two: into how many spans a context is cut when there are `programs` without cutting."""
    return min(_MOST_SPANS, max(1, triton.next_power_of_2(-(-_PROGRAMS // programs))))


@triton.jit
def _span(length: tl.tensor, spans: tl.tensor, TILE: tl.constexpr, WINDOW: tl.constexpr) -> tl.tuple:
    """First tile of a context and tiles per span."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // TILE
    tiles = (length + TILE - 1) // TILE - first
    return first, (tiles + spans - 1) // spans


@triton.jit(do_not_specialize=["table_stride", "spans"])
def _attend_to_span(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    lengths: tl.tensor,
    served: tl.tensor,
    partial: tl.tensor,
    scales: tl.tensor,
    q_stride: tl.tensor,
    table_stride: tl.tensor,
    spans: tl.tensor,
    scale: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    span = tl.program_id(2)
    length = tl.load(lengths + row)
    first, per_span = _span(length, spans, TILE, WINDOW)
    start = (first + span * per_span) * TILE
    stop = tl.minimum(start + per_span * TILE, length)
    if start < stop:
        head = tl.load(served + kv_head) + tl.arange(0, GROUP)
        is_head = head < tl.load(served + kv_head + 1)
        dim = tl.arange(0, PADDED)
        is_dim = dim < HEAD_DIM
        shown = is_head[:, None] & is_dim[None, :]
        query = tl.load(q + row * q_stride + head[:, None] * HEAD_DIM + dim[None, :], mask=shown, other=0.0)
        highest = tl.full((GROUP,), float("-inf"), tl.float32)
        total = tl.zeros((GROUP,), tl.float32)
        mixed = tl.zeros((GROUP, PADDED), tl.float32)
        for at in range(start, stop, TILE):
            token = at + tl.arange(0, TILE)
            is_token = token < stop
            block = tl.load(tables + row * table_stride + token // BLOCK_TOKENS, mask=is_token, other=0)
            slot = block.to(tl.int64) * BLOCK_TOKENS + token % BLOCK_TOKENS
            offset = (slot[:, None] * KV_HEADS + kv_head) * HEAD_DIM + dim[None, :]
            inside = is_token[:, None] & is_dim[None, :]
            key = tl.load(keys + offset, mask=inside, other=0.0)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            visible = is_token
            if WINDOW > 0:
                visible = visible & (token >= length - WINDOW)
            score = tl.where(visible[None, :], score, float("-inf"))
            higher = tl.maximum(highest, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            shrink = tl.exp2(highest - higher)
            value = tl.load(values + offset, mask=inside, other=0.0)
            mixed = mixed * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            total = total * shrink + tl.sum(weight, 1)
            highest = higher
        mixed = mixed / total[:, None]
        place = (row * HEADS + head) * spans + span
        target = partial + place[:, None] * HEAD_DIM + dim[None, :]
        tl.store(target, mixed.to(partial.dtype.element_ty), mask=shown)
        if SPLIT:
            tl.store(scales + place, highest + tl.log2(total), mask=is_head)


@triton.jit(do_not_specialize=["spans"])
def _combine_spans(
    partial: tl.tensor,
    scales: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    spans: tl.tensor,
    COUNT: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    place = row * HEADS + tl.program_id(1)
    length = tl.load(lengths + row)
    first, per_span = _span(length, spans, TILE, WINDOW)
    span = tl.arange(0, COUNT)
    is_span = (span < spans) & ((first + span * per_span) * TILE < length)  # others were left unwritten
    scale = tl.load(scales + place * spans + span, mask=is_span, other=float("-inf"))
    weight = tl.exp2(scale - tl.max(scale, 0))
    weight = weight / tl.sum(weight, 0)
    dim = tl.arange(0, PADDED)
    is_dim = dim < HEAD_DIM
    inside = is_span[:, None] & is_dim[None, :]
    part = tl.load(partial + (place * spans + span[:, None]) * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
    mixed = tl.sum(part * weight[:, None], 0)
    tl.store(out + place * HEAD_DIM + dim, mixed.to(out.dtype.element_ty), mask=is_dim)
