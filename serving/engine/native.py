"""Numerics from the framework's own kernels: fast, in any dtype, and only as reproducible as they are."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional

from serving.engine.numerics import Linear
from serving.engine.place import Communicator


class NativeNumerics:
    """`torch` kernels in `dtype`; partial sums of shards are added in `dtype` as well."""

    paged = False

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
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)

    def add_rms_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Numerics.add_rms_norm`."""
        total = hidden + delta
        return total, self.rms_norm(total, weight, eps)

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


class FusedNumerics(NativeNumerics):
    """Own kernels where the framework has none: attention to the cache in place, one launch per small operation."""

    paged = True

    def __init__(self, dtype: torch.dtype) -> None:
        from serving.engine import fused

        import_module("torch.nn.attention.bias")  # takes a second: now, not in the first step with a chunk
        super().__init__(dtype)
        self._fused = fused

    def add_rms_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Numerics.add_rms_norm`."""
        return self._fused.add_rms_norm(hidden, delta, weight, eps)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `Numerics.gate`."""
        return self._fused.gated(gate, up)


def attend_to_past(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`Numerics.attend` for the last rows of a context: each sees what is before it, and itself. No mask is made."""
    from torch.nn.attention.bias import causal_lower_right

    sequences, tokens, kv_heads, group, head_dim = q.shape
    queries = q.reshape(sequences, tokens, kv_heads * group, head_dim).transpose(1, 2)
    out = functional.scaled_dot_product_attention(
        queries,
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=causal_lower_right(tokens, k.shape[1]),
        enable_gqa=group > 1,
    )
    return out.transpose(1, 2).reshape(q.shape)
