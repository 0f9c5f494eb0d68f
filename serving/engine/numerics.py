"""The operations of a decoder whose result can depend on the order of a sum, behind one protocol.

`exact` makes the order irrelevant; `native` uses the framework's kernels in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from serving.engine.place import Communicator

Linear = Callable[[Tensor], Tensor]
"""Maps activations `[n, in]` to `[n, out]`."""


class Numerics(Protocol):
    """Reducing operations on activations `[n, …]` of dtype `dtype`.

    With `paged`, single rows attend to the cache in place (`PagedAttention`) and not through `attend`.
    """

    dtype: torch.dtype
    paged: bool

    def column_linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """x · weightᵀ + bias with whole rows of x: nothing is summed over shards. `weight` is `[out, in]`."""
        ...

    def row_linear(self, weight: Tensor, bias: Tensor | None, granules: Sequence[int], comm: Communicator) -> Linear:
        """x · weightᵀ summed over the shards, + bias once; x and the columns of `weight` are this shard's.

        `granules` are the widths of the pieces of x that tensor parallelism deals out whole.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) · weight over the last dimension."""
        ...

    def add_rms_norm(self, hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """hidden + delta, and its `rms_norm`."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension."""
        ...

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up."""
        ...

    def cacheable(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[n, heads, head_dim]` as they are to be cached."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Scaled dot-product attention with softmax.

        q `[sequences, tokens, kv_heads, group, head_dim]`, k and v `[sequences, context, kv_heads,
        head_dim]` as cached, visible `[sequences, tokens, context]`; the result has the shape of q.
        """
        ...
