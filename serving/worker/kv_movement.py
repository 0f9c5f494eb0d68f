"""Exchanges KV with peers: cut into chunks, each packed by one gather and one message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from serving.engine.kv_cache import KvCache
from serving.messages import KvPieces, KvSpan
from serving.worker.groups import Group
from serving.worker.rounds import Rounds, Traffic

_SLOT_LISTS = 8  # that are worth keeping

Caches = Callable[[KvPieces], KvCache]
"""The cache that pieces are read from or written to on this worker."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of some pieces that travels as one message."""

    pieces: KvPieces
    layers: tuple[int, int]
    spans: tuple[KvSpan, ...]
    head_dim: int

    @property
    def tokens(self) -> int:
        """Tokens of all spans together."""
        return sum(span.stop - span.start for span in self.spans)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[layers, 2, tokens, heads, head_dim]`."""
        low, high = self.pieces.heads
        return self.layers[1] - self.layers[0], 2, self.tokens, high - low, self.head_dim


@dataclass(slots=True)
class KvMover:
    """Moves KV of one epoch."""

    group: Group
    world: Sequence[str]
    read: Caches
    write: Caches
    dtype: torch.dtype
    message_bytes: int
    _slots: dict[tuple[int, int], tuple[Chunk, Tensor]] = field(default_factory=dict)

    def run(self, sends: Sequence[KvPieces], receives: Sequence[KvPieces], *, share: float = 1.0) -> Traffic:
        """Exchange everything; `share` as for `Rounds`. Raises `GroupBroken` if a peer is lost."""
        own = self.world[self.group.rank]
        self._stay([p for p in sends if p.peer == own], [p for p in receives if p.peer == own])
        out, into = self._queues(sends, own, self.read), self._queues(receives, own, self.write)
        return Rounds(self.group, self, share).run(out, into)

    def _stay(self, sends: Sequence[KvPieces], receives: Sequence[KvPieces]) -> None:
        """What this worker needs and has never touches the group."""
        for source, target in zip(sends, receives, strict=True):
            pairs = zip(self._chunks(source, self.read), self._chunks(target, self.write), strict=True)
            for ours, theirs in pairs:
                self.store(theirs, self.load(ours))

    def _queues(self, pieces: Sequence[KvPieces], own: str, caches: Caches) -> dict[int, Iterator[Chunk]]:
        by_peer: dict[str, list[KvPieces]] = {}
        for one in pieces:
            if one.peer != own:
                by_peer.setdefault(one.peer, []).append(one)
        return {self.world.index(peer): self._queue(some, caches) for peer, some in by_peer.items()}

    def _queue(self, pieces: Sequence[KvPieces], caches: Caches) -> Iterator[Chunk]:
        for one in pieces:
            yield from self._chunks(one, caches)

    def _chunks(self, pieces: KvPieces, caches: Caches) -> Iterator[Chunk]:
        limit = self.group.message_bytes(self.message_bytes) // self.dtype.itemsize
        return chunks(pieces, max(1, limit), caches(pieces).head_dim)

    def buffer(self, chunk: Chunk) -> Tensor:
        """See `Cargo`."""
        return torch.empty(chunk.shape, dtype=self.dtype, device=self.group.device)

    def load(self, chunk: Chunk) -> Tensor:
        """See `Cargo`."""
        cache = self.read(chunk.pieces)
        slots, heads, device = self._slots_of(chunk, cache), chunk.pieces.heads, self.group.device
        if cache.device.type == "cpu" and device.type == "cuda":
            return cache.upload(slots, chunk.layers, heads, device)
        return cache.gather(slots, chunk.layers, heads)

    def store(self, chunk: Chunk, data: Tensor) -> None:
        """See `Cargo`."""
        cache = self.write(chunk.pieces)
        cache.scatter(self._slots_of(chunk, cache), chunk.layers, chunk.pieces.heads, data)

    def _slots_of(self, chunk: Chunk, cache: KvCache) -> Tensor:
        """Where the tokens of a chunk are: the same for one range of layers after the other."""
        key = id(chunk.spans), id(cache)
        if key not in self._slots:
            if len(self._slots) > _SLOT_LISTS:
                self._slots.clear()
            found = [cache.slots(span.blocks, span.start, span.stop) for span in chunk.spans]
            slots = torch.from_numpy(np.concatenate(found)).to(cache.device)
            self._slots[key] = chunk, slots  # the chunk keeps its spans, and so their identity, alive
        return self._slots[key][1]


def chunks(pieces: KvPieces, limit: int, head_dim: int) -> Iterator[Chunk]:
    """Cut pieces so that a chunk has at most `limit` elements, or one layer of one token; a pure function of ranges."""
    token = 2 * (pieces.heads[1] - pieces.heads[0]) * head_dim
    for spans in _batches(pieces.spans, max(1, limit // token)):
        tokens = sum(span.stop - span.start for span in spans)
        step, together = max(1, limit // (token * tokens)), tuple(spans)
        for layer in range(pieces.layers[0], pieces.layers[1], step):
            yield Chunk(pieces, (layer, min(layer + step, pieces.layers[1])), together, head_dim)


def _batches(spans: Sequence[KvSpan], most: int) -> Iterator[list[KvSpan]]:
    """Spans in order, cut where needed, `most` tokens at a time."""
    batch: list[KvSpan] = []
    room = most
    for span in spans:
        start = span.start
        while start < span.stop:
            stop = min(span.stop, start + room)
            batch.append(_part(span, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


def _part(span: KvSpan, start: int, stop: int) -> KvSpan:
    return KvSpan(span.key, start, stop, span.blocks)
