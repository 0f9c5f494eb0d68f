"""Exchanges KV with peers: read in place where the peer's GPU memory can be read, else packed into messages."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgspec
import numpy as np
import torch
from torch import Tensor

from serving.engine.kv_cache import KvCache
from serving.engine.step import on_device
from serving.messages import KvPieces, KvSpan
from serving.worker import reading
from serving.worker.groups import Group
from serving.worker.peer_memory import Sight
from serving.worker.reading import Way
from serving.worker.rounds import Rounds, Traffic

logger = logging.getLogger(__name__)

_HERE = b"here"
_SLOT_LISTS = 8  # that are worth keeping
_COPY_BYTES = 512 << 20  # of one copy: every call has to wait for the interpreter while others decode

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


class Shown(msgspec.Struct, frozen=True, array_like=True):
    """Where the cells of pieces are, and which are whose; no cells if they are in host memory, and have to be sent."""

    cells: Sight | None
    spans: list[KvSpan]


ByPeer = Mapping[int, Sequence[KvPieces]]
"""Pieces by the rank of the peer that they come from or go to."""


@dataclass(slots=True)
class KvMover:
    """Moves KV of one epoch. What is read in place is copied while steps make `way`; without one beside them."""

    group: Group
    world: Sequence[str]
    read: Caches
    write: Caches
    dtype: torch.dtype
    message_bytes: int
    way: Way | None = None
    _slots: dict[tuple[int, int], tuple[Chunk, Tensor]] = field(default_factory=dict)

    def run(self, sends: Sequence[KvPieces], receives: Sequence[KvPieces], *, share: float = 1.0) -> Traffic:
        """Exchange everything; `share` as for `Rounds`. The seconds are those from when it is known what is
        where, and the way is clear, until it has come here.

        Raises `GroupBroken` if a peer is lost.
        """
        asked, own = time.monotonic(), self.world[self.group.rank]
        outgoing, incoming = self._by_peer(sends, own), self._by_peer(receives, own)
        shows = {peer: [self._show(one) for one in some] for peer, some in outgoing.items() if self.group.reads(peer)}
        sources = [peer for peer in incoming if self.group.reads(peer)]
        shown = reading.swap(self.group, shows, sources, Shown)
        read_out, send = _apart(outgoing, shows)
        read_in, receive = _apart(incoming, shown)
        copies = [copy for pieces, there in read_in for copy in self._copies(pieces, *self._see(there))]
        began = reading.bring(self.group, copies, self.way)
        traffic = Rounds(self.group, self, share).run(self._queues(send, self.read), self._queues(receive, self.write))
        ended = time.monotonic()
        self._stay([p for p in sends if p.peer == own], [p for p in receives if p.peer == own])
        reading.finish(self.group, sources, shows)
        known_ms, moved_ms = 1e3 * (began - asked), 1e3 * (ended - began)
        logger.debug("KV: %.1f ms to know what is where, %.1f to bring it", known_ms, moved_ms)
        sent = traffic.sent_bytes + sum(_bytes(one, self.read(one)) for one, _ in read_out)
        received = traffic.received_bytes + sum(_bytes(one, self.write(one)) for one, _ in read_in)
        return Traffic(sent, received, ended - began)

    def _stay(self, sends: Sequence[KvPieces], receives: Sequence[KvPieces]) -> None:
        """What this worker needs and has never touches the group."""
        for source, target in zip(sends, receives, strict=True):
            if (cache := self.read(source)).device.type == self.write(target).device.type:
                cells = cache.cells(source.layers, source.heads)
                reading.bring(self.group, self._copies(target, cells, source.spans), self.way)
                continue
            pairs = zip(self._chunks(source, self.read), self._chunks(target, self.write), strict=True)
            for ours, theirs in pairs:
                self.store(theirs, self.load(ours))

    def _by_peer(self, pieces: Sequence[KvPieces], own: str) -> dict[int, list[KvPieces]]:
        by_peer: dict[int, list[KvPieces]] = {}
        for one in pieces:
            if one.peer != own:
                by_peer.setdefault(self.world.index(one.peer), []).append(one)
        return by_peer

    # -- read in place -------------------------------------------------------------------------------

    def _show(self, pieces: KvPieces) -> Shown:
        cache = self.read(pieces)
        if cache.device.type != self.group.device.type:
            return Shown(None, [])
        return Shown(self.group.show(cache.cells(pieces.layers, pieces.heads)), pieces.spans)

    def _see(self, shown: Shown) -> tuple[Tensor, list[KvSpan]]:
        assert shown.cells is not None
        return self.group.see(shown.cells, self.dtype), shown.spans

    def _copies(self, pieces: KvPieces, cells: Tensor, spans: Sequence[KvSpan]) -> Iterator[Callable[[], None]]:
        """Copies of pieces out of `cells`, those of their layers and heads elsewhere, where `spans` are."""
        cache, tables = self.write(pieces), {span.key: span.blocks for span in spans}
        there = [KvSpan(one.key, one.start, one.stop, tables[one.key]) for one in pieces.spans]
        theirs = msgspec.structs.replace(pieces, spans=there)
        cuts = (chunks(one, _COPY_BYTES // self.dtype.itemsize, cache.head_dim) for one in (theirs, pieces))
        for source, target in zip(*cuts, strict=True):
            low, high = target.layers
            part = cells.narrow(0, low - pieces.layers[0], high - low)
            slots = self._slots_of(source, cache), self._slots_of(target, cache)
            yield partial(cache.copy_rows, part, *slots, target.layers, pieces.heads)

    # -- in messages ---------------------------------------------------------------------------------

    def _queues(self, by_peer: ByPeer, caches: Caches) -> dict[int, Iterator[Chunk]]:
        return {peer: self._queue(some, caches) for peer, some in by_peer.items()}

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
            slots = on_device(np.concatenate(found), cache.device)
            self._slots[key] = chunk, slots  # the chunk keeps its spans, and so their identity, alive
        return self._slots[key][1]


def meet_leader(group: Group, ranks: Sequence[int]) -> None:
    """The first of `ranks` waits until all others have come here; those only say so.

    Raises `GroupBroken` if one is lost.
    """
    leader, *others = ranks
    if group.rank != leader:
        group.send_bytes(_HERE, leader).wait()
        return
    for rank in others:
        group.receive_bytes(rank)


def _apart(
    by_peer: ByPeer, shown: Mapping[int, Sequence[Shown]]
) -> tuple[list[tuple[KvPieces, Shown]], dict[int, list[KvPieces]]]:
    """Pieces that are read in place with where they are, and those that are sent, by peer."""
    read, sent = [], {}
    for peer, some in by_peer.items():
        if peer not in shown:
            sent[peer] = list(some)
            continue
        both = list(zip(some, shown[peer], strict=True))
        read += [(pieces, there) for pieces, there in both if there.cells is not None]
        sent[peer] = [pieces for pieces, there in both if there.cells is None]
    return read, sent


def _bytes(pieces: KvPieces, cache: KvCache) -> int:
    cells = (pieces.layers[1] - pieces.layers[0]) * (pieces.heads[1] - pieces.heads[0])
    tokens = sum(span.stop - span.start for span in pieces.spans)
    return 2 * cells * tokens * cache.head_dim * cache.dtype.itemsize


def chunks(pieces: KvPieces, limit: int, head_dim: int) -> Iterator[Chunk]:
    """Cut pieces so that a chunk has at most `limit` elements, or one layer of one token; a pure function of ranges.

    A chunk has all layers if it can: copies in host memory lie token by token.
    """
    cell = 2 * (pieces.heads[1] - pieces.heads[0]) * head_dim
    step = min(pieces.layers[1] - pieces.layers[0], max(1, limit // cell))
    for spans in _batches(pieces.spans, max(1, limit // (cell * step))):
        together = tuple(spans)
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
