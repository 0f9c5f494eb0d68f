"""Moves rows of caches: one Triton kernel for all layers, near the speed of memory or link.

The framework's indexed copies along an inner dimension are slower by an order of magnitude. A source may be
memory of another GPU. Import only where Triton is: on CUDA, or on a CPU under its interpreter
(`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _VALUES = 8, 8192  # that a program copies at a time, at most: more do not fit in its registers
_PROGRAMS = 2  # for each processor: enough to fill a link, and steps find room beside them


def copy_rows(source: Tensor, there: Tensor, box: Tensor, here: Tensor) -> None:
    """`box[:, :, here] = source[:, :, there]` for `[layers, 2, slots, heads, head_dim]`; heads lie side by side.

    One program for each tile would take every place on the device, and a step would stand still until the last of
    them has begun.
    """
    layers, kinds, _, heads, head_dim = box.shape
    if not len(here):
        return
    width = heads * head_dim
    block = triton.next_power_of_2(width)
    rows = max(1, min(_ROWS, _VALUES // block))
    tiles = triton.cdiv(len(here), rows) * layers * kinds
    _copy_rows[(min(tiles, _programs(box.device)),)](
        source,
        box,
        there,
        here,
        len(here),
        tiles,
        *(source.stride(dim) for dim in range(3)),
        *(box.stride(dim) for dim in range(3)),
        KINDS=kinds,
        WIDTH=width,
        BLOCK=block,
        ROWS=rows,
        num_warps=4,
    )


@cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS
    return _PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)


def gather_rows(box: Tensor, slots: Tensor) -> Tensor:
    """`box[:, :, slots]` of `[layers, 2, slots, heads, head_dim]`, contiguous; heads lie side by side in `box`."""
    layers, kinds, _, heads, head_dim = box.shape
    out = torch.empty((layers, kinds, len(slots), heads, head_dim), dtype=box.dtype, device=box.device)
    copy_rows(box, slots, out, _in_order(slots))
    return out


def pack_rows(box: Tensor, slots: Tensor) -> Tensor:
    """The same token by token: `[slots, layers, 2, heads, head_dim]`."""
    layers, kinds, _, heads, head_dim = box.shape
    out = torch.empty((len(slots), layers, kinds, heads, head_dim), dtype=box.dtype, device=box.device)
    copy_rows(box, slots, out.permute(1, 2, 0, 3, 4), _in_order(slots))
    return out


def scatter_rows(box: Tensor, slots: Tensor, data: Tensor) -> None:
    """`box[:, :, slots] = data` for what `gather_rows` returned."""
    copy_rows(data.contiguous(), _in_order(slots), box, slots)


def _in_order(slots: Tensor) -> Tensor:
    return torch.arange(len(slots), dtype=slots.dtype, device=slots.device)


@triton.jit(do_not_specialize=["count", "tiles"])
def _copy_rows(
    source: tl.tensor,
    target: tl.tensor,
    there: tl.tensor,
    here: tl.tensor,
    count: tl.tensor,
    tiles: tl.tensor,
    source_layer: tl.tensor,
    source_kind: tl.tensor,
    source_row: tl.tensor,
    target_layer: tl.tensor,
    target_kind: tl.tensor,
    target_row: tl.tensor,
    KINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    at = tl.arange(0, BLOCK)
    plane_tiles = tl.cdiv(count, ROWS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        plane = (tile // plane_tiles).to(tl.int64)
        row = (tile % plane_tiles) * ROWS + tl.arange(0, ROWS)
        is_row = row < count
        slot = tl.load(there + row, mask=is_row, other=0).to(tl.int64)
        place = tl.load(here + row, mask=is_row, other=0).to(tl.int64)
        inside = is_row[:, None] & (at < WIDTH)[None, :]
        begin = source + (plane // KINDS) * source_layer + (plane % KINDS) * source_kind
        into = target + (plane // KINDS) * target_layer + (plane % KINDS) * target_kind
        moved = tl.load(begin + slot[:, None] * source_row + at[None, :], mask=inside)
        tl.store(into + place[:, None] * target_row + at[None, :], moved, mask=inside)
