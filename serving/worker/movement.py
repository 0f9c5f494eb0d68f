"""Brings the weights of a role into memory: boxes packed per peer, through the epoch's group, and from disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from planning.resharding import Box
from serving.engine.checkpoints import Checkpoints
from serving.messages import WeightPieces
from serving.worker.groups import Group
from serving.worker.rounds import Rounds, Traffic


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
    """Brings the boxes that a role needs into memory, from here, from peers and from disk."""

    group: Group
    world: Sequence[str]
    held: Mapping[str, HeldTensor]
    reader: Checkpoints
    dtype: torch.dtype
    device: torch.device
    message_bytes: int
    _tensors: dict[str, HeldTensor] = field(default_factory=dict)

    def run(
        self,
        needed: Sequence[Box],
        sends: Sequence[WeightPieces],
        receives: Sequence[WeightPieces],
        *,
        share: float = 1.0,
    ) -> WeightResult:
        """Exchange with all peers and assemble; `share` as for `Rounds`. Raises `GroupBroken` if a peer is lost."""
        self._tensors = {box.tensor: self._destination(box) for box in needed}
        local_bytes = sum(self._copy_local(self._tensors[box.tensor]) for box in needed)
        traffic = Rounds(self.group, self, share).run(self._queues(sends), self._queues(receives))
        disk = [box for pieces in receives if pieces.peer is None for box in pieces.boxes]
        for box in disk:
            self._tensors[box.tensor].view(box).copy_(self.reader.read(box.tensor, box.start, box.stop))
        disk_bytes = sum(box.elements for box in disk) * self.dtype.itemsize
        return WeightResult(self._tensors, local_bytes, disk_bytes, traffic)

    def _queues(self, pieces: Sequence[WeightPieces]) -> dict[int, Iterator[list[Box]]]:
        limit = max(1, self.group.message_bytes(self.message_bytes) // self.dtype.itemsize)
        by_peer: dict[int, list[Box]] = {}
        for one in pieces:
            if one.peer is not None:
                by_peer.setdefault(self.world.index(one.peer), []).extend(one.boxes)
        return {peer: messages(boxes, limit) for peer, boxes in by_peer.items()}

    def load(self, message: list[Box]) -> Tensor:
        """See `Cargo`."""
        return torch.cat([self.held[box.tensor].view(box).reshape(-1) for box in message])

    def buffer(self, message: list[Box]) -> Tensor:
        """See `Cargo`."""
        return torch.empty(sum(box.elements for box in message), dtype=self.dtype, device=self.device)

    def store(self, message: list[Box], data: Tensor) -> None:
        """See `Cargo`."""
        parts = torch.split(data, [box.elements for box in message])
        for box, part in zip(message, parts, strict=True):
            self._tensors[box.tensor].view(box).copy_(part.view(box.shape))

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
