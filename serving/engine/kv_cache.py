"""The paged key/value cache of one place, and the boxes of it that reconfigurations move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serving.engine import host_memory
from serving.engine.blocks import BlockAllocator, blocks_for
from serving.engine.kernels import fused_on

__all__ = ["BlockAllocator", "KvCache", "blocks_for", "slots"]


class KvCache:
    """Keys and values of decoder layers `layers` and KV heads `heads` (absolute, half-open ranges).

    Per layer `[blocks + 1, block_tokens, heads, head_dim]`. Starts as zeros: attention reads padding and
    multiplies it by zero, so every entry must be finite. Block `blocks` belongs to nobody: rows that only
    pad a step are written there. A cache that is only moved from need not be `clean`, and takes host
    memory only as it fills.
    """

    def __init__(
        self,
        layers: tuple[int, int],
        heads: tuple[int, int],
        head_dim: int,
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        clean: bool = True,
    ) -> None:
        self.layers, self.heads = layers, heads
        self.head_dim, self.blocks, self.block_tokens = head_dim, blocks, block_tokens
        shape = (layers[1] - layers[0], 2, blocks + 1, block_tokens, heads[1] - heads[0], head_dim)
        self._paged = (torch.zeros if clean else torch.empty)(shape, dtype=dtype, device=device)
        self._flat = self._paged.view(shape[0], 2, (blocks + 1) * block_tokens, *shape[4:])
        if not clean:
            host_memory.fill_by_large_pages(self._flat)
        self._kernels: Any = None
        if fused_on(self._flat.device):
            self._kernels = import_module("serving.engine.rows")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return self._paged.dtype

    @property
    def device(self) -> torch.device:
        """Where the cache lives."""
        return self._paged.device

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of an absolute layer, in place: `[blocks + 1, block_tokens, heads, head_dim]`."""
        local = self._paged[layer - self.layers[0]]
        return local[0], local[1]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store `k`, `v` `[tokens, heads, head_dim]` of an absolute layer; slot = block × block_tokens + offset."""
        local = self._flat[layer - self.layers[0]]
        local[0].index_copy_(0, slots, k)
        local[1].index_copy_(0, slots, v)

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """K and V `[sequences, table × block_tokens, heads, head_dim]` for block tables `[sequences, table]`."""
        local = self._paged[layer - self.layers[0]]
        shape = (blocks.shape[0], blocks.shape[1] * self.block_tokens, *local.shape[3:])
        index = blocks.reshape(-1)
        return local[0].index_select(0, index).view(shape), local[1].index_select(0, index).view(shape)

    def gather(self, slots: Tensor, layers: tuple[int, int], heads: tuple[int, int]) -> Tensor:
        """A contiguous copy `[layers, 2, slots, heads, head_dim]` of cells, of absolute ranges held here."""
        box = self._box(layers, heads)
        if self._kernels is not None:
            gathered: Tensor = self._kernels.gather_rows(box, slots)
            return gathered
        return self._gather_runs(box, slots, torch.empty(_packed(box, slots), dtype=self.dtype))

    def upload(self, slots: Tensor, layers: tuple[int, int], heads: tuple[int, int], device: torch.device) -> Tensor:
        """`gather` from host memory to a GPU: layer by layer, each packed while the one before is copied."""
        box = self._box(layers, heads)
        out = torch.empty(_packed(box, slots), dtype=self.dtype, device=device)
        for part, target in zip(box.split(1), out.split(1), strict=True):
            pinned = torch.empty(target.shape, dtype=self.dtype, pin_memory=True)
            target.copy_(self._gather_runs(part, slots, pinned), non_blocking=True)
        return out

    def give_back(self) -> None:
        """Return the host memory of a cache to the system; what was here is void."""
        host_memory.give_back(self._flat)

    @staticmethod
    def _gather_runs(box: Tensor, slots: Tensor, out: Tensor) -> Tensor:
        for at, start, count in _runs(slots):
            out[:, :, at : at + count].copy_(box[:, :, start : start + count])
        return out

    def scatter(self, slots: Tensor, layers: tuple[int, int], heads: tuple[int, int], data: Tensor) -> None:
        """Store what `gather` returned, perhaps elsewhere, for as many slots and the same ranges."""
        box, data = self._box(layers, heads), data.to(self._flat.device, self._flat.dtype)
        if self._kernels is not None:
            self._kernels.scatter_rows(box, slots, data)
            return
        for at, start, count in _runs(slots):
            box[:, :, start : start + count].copy_(data[:, :, at : at + count])

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> npt.NDArray[np.int64]:
        """Where tokens `start` … `stop` - 1 of a sequence with this block table are."""
        return slots(blocks, start, stop, self.block_tokens)

    def _box(self, layers: tuple[int, int], heads: tuple[int, int]) -> Tensor:
        if not _within(layers, self.layers) or not _within(heads, self.heads):
            raise ValueError(
                f"layers {layers}, KV heads {heads} are not within layers {self.layers}, KV heads {self.heads}"
            )
        first_layer, first_head = self.layers[0], self.heads[0]
        return self._flat[
            layers[0] - first_layer : layers[1] - first_layer, :, :, heads[0] - first_head : heads[1] - first_head
        ]


def _packed(box: Tensor, slots: Tensor) -> tuple[int, ...]:
    return *box.shape[:2], len(slots), *box.shape[3:]


def _runs(slots: Tensor) -> Iterator[tuple[int, int, int]]:
    """(position, first slot, count) of every stretch of consecutive slots: on a CPU slices are copied the quickest."""
    found = slots.numpy()
    if not len(found):
        return
    cuts = np.flatnonzero(np.diff(found) != 1) + 1
    for at, stop in pairwise([0, *cuts.tolist(), len(found)]):
        yield at, int(found[at]), stop - at


def slots(blocks: Sequence[int], start: int, stop: int, block_tokens: int) -> npt.NDArray[np.int64]:
    """Cache slots of tokens `start` … `stop` - 1: block × `block_tokens` + offset. Raises `ValueError` if they do
    not fit in the table."""
    if blocks_for(stop, block_tokens) > len(blocks):
        raise ValueError(f"{stop} tokens do not fit in {len(blocks)} blocks of {block_tokens}")
    positions = np.arange(start, stop, dtype=np.int64)
    table = np.asarray(blocks, dtype=np.int64)
    found: npt.NDArray[np.int64] = table[positions // block_tokens] * block_tokens + positions % block_tokens
    return found


def _within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return outer[0] <= inner[0] <= inner[1] <= outer[1]
