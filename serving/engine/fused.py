"""Small operations of a layer, one Triton kernel each, where the framework would launch several.

Import only where Triton is: on CUDA, or on a CPU under its interpreter (`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_GATE_BLOCK = 1024


def add_rms_norm(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(hidden + delta, its RMS norm times weight), both `[n, width]`; statistics in float32."""
    rows, width = hidden.shape
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    _add_rms_norm[(rows,)](hidden, delta, weight, total, normed, eps, WIDTH=width, BLOCK=block, num_warps=warps)
    return total, normed


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up for `[n, width]` with any row stride, computed in float32."""
    rows, width = gate.shape
    out = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    grid = (rows, triton.cdiv(width, _GATE_BLOCK))
    _gated[grid](gate, up, out, gate.stride(0), up.stride(0), WIDTH=width, BLOCK=_GATE_BLOCK)
    return out


def cache_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turn: tuple[Tensor, Tensor] | None,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Store `k`, `v` `[n, kv_heads, head_dim]` in a layer's `keys`, `values` at `slots`; returns what is to attend.

    With `turn` = cos and sin `[n, 1, head_dim / 2]` queries `[n, heads, head_dim]` and keys are rotated
    first, in float32. Rows of the inputs may have any stride, heads lie side by side.
    """
    rows, heads, head_dim = q.shape
    rotary = turn is not None
    cos, sin = turn if turn is not None else (q, q)
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device) if rotary else q
    rotated = heads if rotary else 0
    _cache_rows[(rows, rotated + k.shape[1])](
        q,
        k,
        v,
        cos,
        sin,
        slots,
        out,
        keys,
        values,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        HEADS=rotated,
        KV_HEADS=k.shape[1],
        HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(triton.cdiv(head_dim, 2)),
        ROTARY=rotary,
        num_warps=1,
    )
    return out


@triton.jit
def _add_rms_norm(
    hidden: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    normed: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    base = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    held = tl.load(hidden + base + at, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(delta + base + at, mask=inside, other=0.0).to(tl.float32)
    rounded = (held + added).to(total.dtype.element_ty)
    tl.store(total + base + at, rounded, mask=inside)
    x = rounded.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    scale = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + base + at, (x * scale).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _gated(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    x = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + at, (x / (1.0 + tl.exp(-x)) * factor).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _cache_rows(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    ROTARY: tl.constexpr,
) -> None:
    """Programs of a row: one per query head if those are rotated, then one per KV head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = (HEAD_DIM + 1) // 2
    low = tl.arange(0, HALF)
    high = low + half
    is_low = low < half
    is_high = high < HEAD_DIM
    if head < HEADS:
        source = q + row * q_stride + head * HEAD_DIM
        target = out + (row * HEADS + head) * HEAD_DIM
    else:
        head -= HEADS
        source = k + row * k_stride + head * HEAD_DIM
        offset = (tl.load(slots + row).to(tl.int64) * KV_HEADS + head) * HEAD_DIM
        target = keys + offset
        value = v + row * v_stride + head * HEAD_DIM
        tl.store(values + offset + low, tl.load(value + low, mask=is_low), mask=is_low)
        tl.store(values + offset + high, tl.load(value + high, mask=is_high), mask=is_high)
    first = tl.load(source + low, mask=is_low, other=0.0)
    second = tl.load(source + high, mask=is_high, other=0.0)
    if ROTARY:
        c = tl.load(cos + row * half + low, mask=is_low, other=0.0).to(tl.float32)
        s = tl.load(sin + row * half + low, mask=is_low, other=0.0).to(tl.float32)
        x = first.to(tl.float32)
        y = second.to(tl.float32)
        first = (x * c - y * s).to(first.dtype)
        second = (y * c + x * s).to(second.dtype)
    tl.store(target + low, first, mask=is_low)
    tl.store(target + high, second, mask=is_high)
