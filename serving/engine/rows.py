"""Packs and unpacks rows of a cache: one Triton kernel for all layers, near the speed of the memory.

The framework's indexed copies along an inner dimension are slower by an order of magnitude. Import only
where Triton is: on CUDA, or on a CPU under its interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def gather_rows(box: Tensor, slots: Tensor) -> Tensor:
    """`box[:, :, slots]` of `[layers, 2, slots, heads, head_dim]`, contiguous; heads lie side by side in `box`."""
    layers, kinds, _, heads, head_dim = box.shape
    out = torch.empty((layers, kinds, len(slots), heads, head_dim), dtype=box.dtype, device=box.device)
    _move(box, out, slots, gather=True)
    return out


def scatter_rows(box: Tensor, slots: Tensor, data: Tensor) -> None:
    """`box[:, :, slots] = data` for what `gather_rows` returned."""
    _move(box, data.contiguous(), slots, gather=False)


def _move(box: Tensor, packed: Tensor, slots: Tensor, *, gather: bool) -> None:
    layers, kinds, _, heads, head_dim = box.shape
    if not len(slots):
        return
    width = heads * head_dim
    _move_rows[(len(slots), layers * kinds)](
        box,
        packed,
        slots,
        len(slots),
        box.stride(0),
        box.stride(1),
        box.stride(2),
        KINDS=kinds,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        GATHER=gather,
        num_warps=2,
    )


@triton.jit(do_not_specialize=["count"])
def _move_rows(
    box: tl.tensor,
    packed: tl.tensor,
    slots: tl.tensor,
    count: tl.tensor,
    layer_stride: tl.tensor,
    kind_stride: tl.tensor,
    row_stride: tl.tensor,
    KINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    plane = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    slot = tl.load(slots + row).to(tl.int64)
    held = box + (plane // KINDS) * layer_stride + (plane % KINDS) * kind_stride + slot * row_stride + at
    moved = packed + (plane * count + row) * WIDTH + at
    if GATHER:
        tl.store(moved, tl.load(held, mask=inside), mask=inside)
    else:
        tl.store(held, tl.load(moved, mask=inside), mask=inside)
