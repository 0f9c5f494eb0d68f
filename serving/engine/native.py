"""Numerics from the framework's own kernels: fast, in any dtype, and only as reproducible as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from serving.engine.numerics import Linear
from serving.engine.place import Communicator


class NativeNumerics:
    """`torch` kernels in `dtype`; partial sums of shards are added in `dtype` as well."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def column_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """See `Numerics.column_linear`."""
        return lambda x: functional.linear(x, weight, bias)

    def row_linear(self, weight: Tensor, bias: Tensor | None, granules: Sequence[int], comm: Communicator) -> Linear:
        """See `Numerics.row_linear`."""

        def apply(x: Tensor) -> Tensor:
            total = comm.all_reduce(functional.linear(x, weight))
            return total if bias is None else total + bias

        return apply

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Statistics in float32, as the models were trained."""
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """See `Numerics.layer_norm`."""
        return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `Numerics.gate`."""
        return functional.silu(gate) * up

    def cacheable(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Cached as they are."""
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """One call of the fused kernel; each KV head serves its group of query heads."""
        sequences, tokens, kv_heads, group, head_dim = q.shape
        queries = q.reshape(sequences, tokens, kv_heads * group, head_dim).transpose(1, 2)
        out = functional.scaled_dot_product_attention(
            queries, k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible[:, None], enable_gqa=group > 1
        )
        return out.transpose(1, 2).reshape(q.shape)
