"""Exchanges KV with peers: cut into chunks, each packed by one gather, one message per peer and round.

Both sides derive the same chunks from the same spans, so nothing but data crosses the group. A pair's
chunks match in order, and rounds are numbered alike everywhere: nobody waits in a circle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from serving.engine.kv_cache import KvCache
from serving.messages import KvPieces, KvSpan
from serving.worker.groups import Group

Caches = Callable[[KvPieces], KvCache]
"""The cache that pieces are read from or written to on this worker."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of some pieces that travels as one message."""

    pieces: KvPieces
    layers: tuple[int, int]
    spans: tuple[KvSpan, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all spans together."""
        return sum(span.stop - span.start for span in self.spans)

    def shape(self, head_dim: int) -> tuple[int, ...]:
        """`[layers, 2, tokens, heads, head_dim]`."""
        low, high = self.pieces.heads
        return self.layers[1] - self.layers[0], 2, self.tokens, high - low, head_dim


@dataclass(slots=True)
class KvMover:
    """Moves KV of one epoch. `share` of the time is spent moving while others decode; 1 is full speed."""

    group: Group
    world: Sequence[str]
    read: Caches
    write: Caches
    head_dim: int
    dtype: torch.dtype
    message_bytes: int

    def run(self, sends: Sequence[KvPieces], receives: Sequence[KvPieces], *, share: float = 1.0) -> int:
        """Exchange everything; returns the bytes sent to others. Raises `GroupBroken` if a peer is lost."""
        own = self.world[self.group.rank]
        self._stay([p for p in sends if p.peer == own], [p for p in receives if p.peer == own])
        out, into = self._rounds(sends, own), self._rounds(receives, own)
        return sum(self._round(sent or [], taken or [], share) for sent, taken in zip_longest(out, into))

    def _stay(self, sends: Sequence[KvPieces], receives: Sequence[KvPieces]) -> None:
        """What this worker needs and has never touches the group."""
        for source, target in zip(sends, receives, strict=True):
            for ours, theirs in zip(self._chunks(source), self._chunks(target), strict=True):
                self._store(theirs, self._load(ours))

    def _rounds(self, pieces: Sequence[KvPieces], own: str) -> Iterator[list[Chunk]]:
        """In every round one chunk per peer."""
        peers = dict.fromkeys(one.peer for one in pieces if one.peer != own)
        queues = [self._queue([one for one in pieces if one.peer == peer]) for peer in peers]
        for found in zip_longest(*queues):
            yield [chunk for chunk in found if chunk is not None]

    def _queue(self, pieces: Sequence[KvPieces]) -> Iterator[Chunk]:
        for one in pieces:
            yield from self._chunks(one)

    def _chunks(self, pieces: KvPieces) -> Iterator[Chunk]:
        return chunks(pieces, max(1, self.message_bytes // self.dtype.itemsize), self.head_dim)

    def _round(self, sent: Sequence[Chunk], taken: Sequence[Chunk], share: float) -> int:
        began = time.monotonic()
        outgoing = [(self._load(chunk), self.world.index(chunk.pieces.peer)) for chunk in sent]
        incoming = [(self._buffer(chunk), self.world.index(chunk.pieces.peer)) for chunk in taken]
        self.group.exchange(outgoing, incoming)
        for chunk, (buffer, _) in zip(taken, incoming, strict=True):
            self._store(chunk, buffer)
        if share < 1.0:
            self._settle()
            time.sleep((time.monotonic() - began) * (1.0 / share - 1.0))
        return sum(data.numel() * data.element_size() for data, _ in outgoing)

    def _settle(self) -> None:
        if self.group.device.type == "cuda":
            torch.cuda.current_stream(self.group.device).synchronize()

    def _buffer(self, chunk: Chunk) -> Tensor:
        return torch.empty(chunk.shape(self.head_dim), dtype=self.dtype, device=self.group.device)

    def _load(self, chunk: Chunk) -> Tensor:
        cache = self.read(chunk.pieces)
        data = cache.gather(_slots(chunk, cache), chunk.layers, chunk.pieces.heads)
        return data.to(self.group.device)

    def _store(self, chunk: Chunk, data: Tensor) -> None:
        cache = self.write(chunk.pieces)
        cache.scatter(_slots(chunk, cache), chunk.layers, chunk.pieces.heads, data)


def _slots(chunk: Chunk, cache: KvCache) -> Tensor:
    found = [cache.slots(span.blocks, span.start, span.stop) for span in chunk.spans]
    return torch.from_numpy(np.concatenate(found)).to(cache.device, non_blocking=True)


def chunks(pieces: KvPieces, limit: int, head_dim: int) -> Iterator[Chunk]:
    """Cut pieces so that a chunk has at most `limit` elements, or one layer of one token; a pure function of ranges."""
    token = 2 * (pieces.heads[1] - pieces.heads[0]) * head_dim
    for spans in _batches(pieces.spans, max(1, limit // token)):
        tokens = sum(span.stop - span.start for span in spans)
        step = max(1, limit // (token * tokens))
        for layer in range(pieces.layers[0], pieces.layers[1], step):
            yield Chunk(pieces, (layer, min(layer + step, pieces.layers[1])), tuple(spans))


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
