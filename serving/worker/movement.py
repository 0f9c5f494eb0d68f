"""Brings the weights of a role into memory: boxes packed per peer, through the epoch's group, and from disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from planning.resharding import Box
from serving.engine.weights import CheckpointReader
from serving.messages import WeightPieces
from serving.worker.groups import Group


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


@dataclass(slots=True)
class WeightResult:
    """Tensors of a role by checkpoint name, and the bytes that came from each kind of source."""

    tensors: dict[str, HeldTensor]
    local_bytes: int = 0
    received_bytes: int = 0
    disk_bytes: int = 0


@dataclass(slots=True)
class _Packing:
    """Boxes of one peer, cut into messages of at most `limit` elements (a larger box is one message)."""

    boxes: Sequence[Box]
    limit: int

    def messages(self) -> Iterator[list[Box]]:
        batch: list[Box] = []
        size = 0
        for box in self.boxes:
            if batch and size + box.elements > self.limit:
                yield batch
                batch, size = [], 0
            batch.append(box)
            size += box.elements
        if batch:
            yield batch


@dataclass(slots=True)
class WeightMover:
    """Brings the boxes that a role needs into memory, from here, from peers and from disk."""

    group: Group
    world: Sequence[str]
    held: Mapping[str, HeldTensor]
    reader: CheckpointReader
    dtype: torch.dtype
    device: torch.device
    message_bytes: int
    _limit: int = field(init=False)

    def __post_init__(self) -> None:
        self._limit = max(1, self.message_bytes // self.dtype.itemsize)

    def run(
        self, needed: Sequence[Box], sends: Sequence[WeightPieces], receives: Sequence[WeightPieces]
    ) -> WeightResult:
        """Exchange with all peers and assemble. Raises `GroupBroken` if a peer is lost."""
        result = WeightResult({box.tensor: self._destination(box) for box in needed})
        for box in needed:
            result.local_bytes += self._copy_local(result.tensors[box.tensor])
        outgoing = [
            (self._pack(message), self._rank(pieces.peer))
            for pieces in sends
            for message in _Packing(pieces.boxes, self._limit).messages()
        ]
        incoming = [
            (message, torch.empty(sum(box.elements for box in message), dtype=self.dtype, device=self.device), peer)
            for pieces in receives
            if pieces.peer is not None
            for peer in [self._rank(pieces.peer)]
            for message in _Packing(pieces.boxes, self._limit).messages()
        ]
        self.group.exchange(outgoing, [(buffer, peer) for _, buffer, peer in incoming])
        for message, buffer, _ in incoming:
            result.received_bytes += self._unpack(message, buffer, result.tensors)
        for pieces in receives:
            if pieces.peer is None:
                result.disk_bytes += self._read(pieces.boxes, result.tensors)
        return result

    def _rank(self, peer: str | None) -> int:
        return self.world.index(peer or "")

    def _destination(self, box: Box) -> HeldTensor:
        held = self.held.get(box.tensor)
        if held is not None and held.box.overlap(box) == box:
            return HeldTensor(box, held.view(box))  # already here: a view, not a copy
        return HeldTensor(box, torch.empty(box.shape, dtype=self.dtype, device=self.device))

    def _copy_local(self, target: HeldTensor) -> int:
        held = self.held.get(target.box.tensor)
        common = held.box.overlap(target.box) if held else None
        if held is None or common is None:
            return 0
        if common != target.box:
            target.view(common).copy_(held.view(common))
        return common.elements * self.dtype.itemsize

    def _pack(self, boxes: Sequence[Box]) -> Tensor:
        return torch.cat([self.held[box.tensor].view(box).reshape(-1) for box in boxes])

    def _unpack(self, boxes: Sequence[Box], buffer: Tensor, tensors: Mapping[str, HeldTensor]) -> int:
        parts = torch.split(buffer, [box.elements for box in boxes])
        for box, part in zip(boxes, parts, strict=True):
            tensors[box.tensor].view(box).copy_(part.view(box.shape))
        return buffer.numel() * self.dtype.itemsize

    def _read(self, boxes: Sequence[Box], tensors: Mapping[str, HeldTensor]) -> int:
        for box in boxes:
            data = self.reader.read(box.tensor, box.start, box.stop)
            tensors[box.tensor].view(box).copy_(data)
        return sum(box.elements for box in boxes) * self.dtype.itemsize
