"""The paged key/value cache of one place, and the boxes of it that reconfigurations move."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
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

_UPLOAD_BYTES = 16 << 20  # that is copied to a GPU at once
_UPLOADS = 3  # of these that are under way, while the next one is packed

__all__ = ["BlockAllocator", "KvCache", "blocks_for", "slots", "slots_of"]


class KvCache:
    """Keys and values of decoder layers `layers` and KV heads `heads` (absolute, half-open ranges).

    Per layer `[blocks + 1, block_tokens, heads, head_dim]`. Starts as zeros: attention reads padding and
    multiplies it by zero, so every entry must be finite. Block `blocks` belongs to nobody: rows that only
    pad a step are written there.

    A `log` is never computed from. It lies in host memory token by token, so that what comes in and goes out
    in sequence is copied in large pieces, and takes memory only as it fills.
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
        log: bool = False,
    ) -> None:
        self.layers, self.heads = layers, heads
        self.head_dim, self.blocks, self.block_tokens = head_dim, blocks, block_tokens
        planes, slots, cell = (layers[1] - layers[0], 2), (blocks + 1) * block_tokens, (heads[1] - heads[0], head_dim)
        if log:
            self._flat = _planes_first(torch.empty((slots, *planes, *cell), dtype=dtype, device=device))
            host_memory.fill_by_large_pages(self._flat)
        else:
            self._flat = torch.zeros((*planes, slots, *cell), dtype=dtype, device=device)
            self._paged = self._flat.view(*planes, blocks + 1, block_tokens, *cell)
        self._kernels: Any = None
        if fused_on(self._flat.device):
            self._kernels = import_module("serving.engine.rows")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return self._flat.dtype

    @property
    def device(self) -> torch.device:
        """Where the cache lives."""
        return self._flat.device

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
        box = self.cells(layers, heads)
        if self._kernels is not None:
            gathered: Tensor = self._kernels.gather_rows(box, slots)
            return gathered
        return self._gather_runs(box, slots, torch.empty(_packed(box, slots), dtype=self.dtype))

    def copy_rows(
        self, source: Tensor, there: Tensor, here: Tensor, layers: tuple[int, int], heads: tuple[int, int]
    ) -> None:
        """Store slots `there` of `source`, cells like `cells(layers, heads)`, in the slots `here`; on this device."""
        box = self.cells(layers, heads)
        if self._kernels is not None:
            self._kernels.copy_rows(source, there, box, here)
        else:
            box.index_copy_(2, here.long(), source.index_select(2, there.long()))

    def pack(self, slots: Tensor) -> Tensor:
        """A contiguous copy of cells token by token, `[slots, layers, 2, heads, head_dim]`: what logs are made of."""
        if self._kernels is not None:
            packed: Tensor = self._kernels.pack_rows(self._flat, slots)
            return packed
        out = torch.empty(_tokens_first(self._flat[:, :, : len(slots)]).shape, dtype=self.dtype)
        self._gather_runs(self._flat, slots, _planes_first(out))
        return out

    def unpack(self, slots: Tensor, data: Tensor) -> None:
        """Store what `pack` returned in a log."""
        # In one call, which lets others have the interpreter: of the framework's own one copies element by element.
        _bytes(_tokens_first(self._flat))[slots.numpy()] = _bytes(data)

    def populate(self, first: int, most_bytes: int) -> int:
        """Have the memory of some blocks of a log before something is written there; returns of how many."""
        rows = _tokens_first(self._flat)[first * self.block_tokens :]
        count = max(1, most_bytes // (rows[0].nbytes * self.block_tokens))
        host_memory.populate(rows[: count * self.block_tokens])
        return count

    def upload(self, slots: Tensor, layers: tuple[int, int], heads: tuple[int, int], device: torch.device) -> Tensor:
        """`gather` from a log to a GPU: some tokens at a time, packed while those before are copied."""
        box = self.cells(layers, heads)
        out = torch.empty(_tokens_first(box[:, :, : len(slots)]).shape, dtype=self.dtype, device=device)
        most = max(1, _UPLOAD_BYTES * len(slots) // out.nbytes)
        under_way: deque[torch.cuda.Event] = deque()
        for some, target in zip(slots.split(most), out.split(most), strict=True):
            if len(under_way) == _UPLOADS:
                under_way.popleft().synchronize()
            pinned = torch.empty(target.shape, dtype=self.dtype, pin_memory=True)
            self._gather_runs(box, some, _planes_first(pinned))
            target.copy_(pinned, non_blocking=True)
            under_way.append(torch.cuda.Event())
            under_way[-1].record()
        return _planes_first(out).contiguous()

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
        box, data = self.cells(layers, heads), data.to(self._flat.device, self._flat.dtype)
        if self._kernels is not None:
            self._kernels.scatter_rows(box, slots, data)
            return
        self._scatter_runs(box, slots, data)

    @staticmethod
    def _scatter_runs(box: Tensor, slots: Tensor, data: Tensor) -> None:
        for at, start, count in _runs(slots):
            box[:, :, start : start + count].copy_(data[:, :, at : at + count])

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> npt.NDArray[np.int64]:
        """Where tokens `start` … `stop` - 1 of a sequence with this block table are."""
        return slots(blocks, start, stop, self.block_tokens)

    def cells(self, layers: tuple[int, int], heads: tuple[int, int]) -> Tensor:
        """All cells of absolute ranges held here, in place: `[layers, 2, slots, heads, head_dim]`."""
        if not within(layers, self.layers) or not within(heads, self.heads):
            raise ValueError(
                f"layers {layers}, KV heads {heads} are not within layers {self.layers}, KV heads {self.heads}"
            )
        first_layer, first_head = self.layers[0], self.heads[0]
        return self._flat[
            layers[0] - first_layer : layers[1] - first_layer, :, :, heads[0] - first_head : heads[1] - first_head
        ]


def _planes_first(tokens: Tensor) -> Tensor:
    """`[layers, 2, tokens, …]` of `[tokens, layers, 2, …]`, in place."""
    return tokens.permute(1, 2, 0, 3, 4)


def _tokens_first(box: Tensor) -> Tensor:
    return box.permute(2, 0, 1, 3, 4)


def _bytes(rows: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of contiguous rows, in place."""
    return rows.view(len(rows), -1).view(torch.uint8).numpy()


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


def slots_of(tables: Iterable[tuple[Sequence[int], int, int]], block_tokens: int) -> Tensor:
    """The slots of some sequences, one after the other, of (block table, start, stop). Mostly one token of each."""
    spans = list(tables)
    if all(start + 1 == stop for _, start, stop in spans):
        return torch.tensor(
            [blocks[start // block_tokens] * block_tokens + start % block_tokens for blocks, start, _ in spans],
            dtype=torch.int64,
        )
    return torch.from_numpy(np.concatenate([slots(*span, block_tokens) for span in spans]))


def within(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    """Whether one range lies inside another."""
    return outer[0] <= inner[0] <= inner[1] <= outer[1]
