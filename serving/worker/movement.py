"""Brings the weights of a role into memory: from here, from peers (read in place, or packed), and from disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from planning.resharding import Box
from serving.engine.checkpoints import Checkpoints
from serving.messages import WeightPieces
from serving.worker import reading
from serving.worker.groups import Group
from serving.worker.peer_memory import Sight
from serving.worker.reading import Way
from serving.worker.rounds import Rounds, Traffic

_ARENA_BYTES = 1 << 30  # of tensors in one allocation of a GPU: a peer opens allocations one by one
_ALIGNED = 128  # elements: kernels read from such places the quickest


@dataclass(frozen=True, slots=True)
class HeldTensor:
    """The part of a checkpoint tensor that is in this device's memory."""

    box: Box
    data: Tensor

    def view(self, box: Box) -> Tensor:
        """The elements of `box`, which must lie inside `self.box`; shares memory."""
        slices = tuple(
            slice(low - base, high - base) for low, high, base in zip(box.start, box.stop, self.box.start, strict=True)
        )
        return self.data[slices]


@dataclass(frozen=True, slots=True)
class WeightResult:
    """Tensors of a role by name, the bytes that were here, those that came from disk, and the traffic."""

    tensors: dict[str, HeldTensor]
    local_bytes: int
    disk_bytes: int
    traffic: Traffic


@dataclass(slots=True)
class WeightMover:
    """Brings the boxes that a role needs into memory, from here, from peers and from disk. What is read in place is
    copied while steps make `way`; without one beside them.
    """

    group: Group
    world: Sequence[str]
    held: Mapping[str, HeldTensor]
    reader: Checkpoints
    dtype: torch.dtype
    device: torch.device
    message_bytes: int
    way: Way | None = None
    _tensors: dict[str, HeldTensor] = field(default_factory=dict)
    _sources: Mapping[str, HeldTensor] = field(default_factory=dict)

    def run(
        self,
        needed: Sequence[Box],
        sends: Sequence[WeightPieces],
        receives: Sequence[WeightPieces],
        *,
        share: float = 1.0,
    ) -> WeightResult:
        """Exchange with all peers and assemble; `share` as for `Rounds`. Raises `GroupBroken` if a peer is lost."""
        self._tensors, self._sources = self._destinations(needed), self.held
        local_bytes = sum(self._copy_local(self._tensors[box.tensor]) for box in needed)
        traffic = self._exchange(self._by_peer(sends), self._by_peer(receives), share)
        disk = [box for pieces in receives if pieces.peer is None for box in pieces.boxes]
        for box in disk:
            self._tensors[box.tensor].view(box).copy_(self.reader.read(box.tensor, box.start, box.stop))
        disk_bytes = sum(box.elements for box in disk) * self.dtype.itemsize
        traffic = traffic.then(self._relay(sends, receives, share))
        return WeightResult(self._tensors, local_bytes, disk_bytes, traffic)

    def _relay(self, sends: Sequence[WeightPieces], receives: Sequence[WeightPieces], share: float) -> Traffic:
        """Pass on what has come, and take what has come to a neighbour."""
        onwards, inwards = self._by_peer(sends, relayed=True), self._by_peer(receives, relayed=True)
        if not onwards and not inwards:
            return Traffic()
        self._sources = self._tensors
        if self.device.type == "cuda":  # a peer is about to read what was copied from disk
            torch.cuda.current_stream(self.device).synchronize()
        return self._exchange(onwards, inwards, share)

    def _by_peer(self, pieces: Sequence[WeightPieces], *, relayed: bool = False) -> dict[int, list[Box]]:
        by_peer: dict[int, list[Box]] = {}
        for one in pieces:
            if one.peer is not None and one.relayed == relayed:
                by_peer.setdefault(self.world.index(one.peer), []).extend(one.boxes)
        return by_peer

    def _exchange(self, sends: Mapping[int, list[Box]], receives: Mapping[int, list[Box]], share: float) -> Traffic:
        """The seconds are those from when it is known what is where, and the way is clear, until it has come here."""
        near = self.group.reads
        shows = {peer: [self._show(box) for box in boxes] for peer, boxes in sends.items() if near(peer)}
        sources = [peer for peer in receives if near(peer)]
        targets = {peer: [self._tensors[box.tensor].view(box) for box in receives[peer]] for peer in sources}
        shown = reading.swap(self.group, shows, sources, Sight)
        seen = {peer: [self.group.see(one, self.dtype) for one in some] for peer, some in shown.items()}
        copies = [copy for peer in sources for copy in _reads(targets[peer], seen[peer])]
        began = reading.bring(self.group, copies, self.way)
        limit = max(1, self.group.message_bytes(self.message_bytes) // self.dtype.itemsize)
        out, into = (
            {peer: messages(boxes, limit) for peer, boxes in some.items() if not near(peer)}
            for some in (sends, receives)
        )
        traffic = Rounds(self.group, self, share).run(out, into)
        ended = time.monotonic()
        reading.finish(self.group, sources, shows)
        sent, received = (
            sum(box.elements for peer, boxes in some.items() if near(peer) for box in boxes) * self.dtype.itemsize
            for some in (sends, receives)
        )
        return Traffic(traffic.sent_bytes + sent, traffic.received_bytes + received, ended - began)

    def _show(self, box: Box) -> Sight:
        return self.group.show(self._sources[box.tensor].view(box))

    def load(self, message: list[Box]) -> Tensor:
        """See `Cargo`."""
        return torch.cat([self._sources[box.tensor].view(box).reshape(-1) for box in message])

    def buffer(self, message: list[Box]) -> Tensor:
        """See `Cargo`."""
        return torch.empty(sum(box.elements for box in message), dtype=self.dtype, device=self.device)

    def store(self, message: list[Box], data: Tensor) -> None:
        """See `Cargo`."""
        parts = torch.split(data, [box.elements for box in message])
        for box, part in zip(message, parts, strict=True):
            self._tensors[box.tensor].view(box).copy_(part.view(box.shape))

    def _destinations(self, needed: Sequence[Box]) -> dict[str, HeldTensor]:
        """What is here as it is: a view, not a copy; room for the rest."""
        held = {box.tensor: self.held.get(box.tensor) for box in needed}
        here = {name: one for name, one in held.items() if one is not None}
        missing = [box for box in needed if box.tensor not in here or here[box.tensor].box.overlap(box) != box]
        rooms = dict(zip([box.tensor for box in missing], self._rooms(missing), strict=True))
        return {
            box.tensor: HeldTensor(box, rooms[box.tensor] if box.tensor in rooms else here[box.tensor].view(box))
            for box in needed
        }

    def _rooms(self, boxes: Sequence[Box]) -> list[Tensor]:
        """Memory for boxes; on a GPU in arenas, in their order, so that what goes together is freed together."""
        if self.device.type != "cuda":
            return [torch.empty(box.shape, dtype=self.dtype, device=self.device) for box in boxes]
        sizes = [-(-box.elements // _ALIGNED) * _ALIGNED for box in boxes]
        rooms: list[Tensor] = []
        for low, high in arenas(sizes, _ARENA_BYTES // self.dtype.itemsize):
            arena = torch.empty(sum(sizes[low:high]), dtype=self.dtype, device=self.device)
            parts = arena.split(sizes[low:high])
            rooms += [part[: box.elements].view(box.shape) for box, part in zip(boxes[low:high], parts, strict=True)]
        return rooms

    def _copy_local(self, target: HeldTensor) -> int:
        held = self.held.get(target.box.tensor)
        common = held.box.overlap(target.box) if held else None
        if held is None or common is None:
            return 0
        if common != target.box:
            target.view(common).copy_(held.view(common))
        return common.elements * self.dtype.itemsize


def _reads(targets: list[Tensor], seen: list[Tensor]) -> Iterator[Callable[[], None]]:
    """Copies of what is seen, a gigabyte at a time: every call has to wait for the interpreter while others decode."""
    for low, high in arenas([one.nbytes for one in targets], _ARENA_BYTES):
        yield partial(torch._foreach_copy_, targets[low:high], seen[low:high], True)


def arenas(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive sizes that come to at most `limit` together, or to one size."""
    low = total = 0
    for at, size in enumerate(sizes):
        if at > low and total + size > limit:
            yield low, at
            low, total = at, 0
        total += size
    if sizes:
        yield low, len(sizes)


def messages(boxes: Sequence[Box], limit: int) -> Iterator[list[Box]]:
    """Boxes in order, large ones cut along their first dimension, in messages of at most `limit` elements
    or one row.
    """
    batch: list[Box] = []
    size = 0
    for box in (part for whole in boxes for part in _cut(whole, limit)):
        if batch and size + box.elements > limit:
            yield batch
            batch, size = [], 0
        batch.append(box)
        size += box.elements
    if batch:
        yield batch


def _cut(box: Box, limit: int) -> Iterator[Box]:
    rows = max(1, limit * box.shape[0] // box.elements)
    for start in range(box.start[0], box.stop[0], rows):
        yield replace(box, start=(start, *box.start[1:]), stop=(min(start + rows, box.stop[0]), *box.stop[1:]))
