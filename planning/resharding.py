"""Boxes of tensors, who holds them, and which bytes must move between two layouts.

Everything here is address-free: a box is a range of element indices of a checkpoint tensor, or of
layers × KV heads of the cache. Binding to buffers comes after planning.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from operator import lt, sub

from data.layout import Device, Layout, ParallelConfig, Position
from data.models import ModelSpec, TensorSpec, kv_head_range, tensors, unit_range
from planning.relays import Route, relay

Distance = Callable[[Device, Device], int]


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """Half-open N-dimensional range `start[i] <= index < stop[i]` of the elements of one checkpoint tensor."""

    tensor: str
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements inside."""
        return prod(map(sub, self.stop, self.start))

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent along every dimension."""
        return tuple(map(sub, self.stop, self.start))

    def overlap(self, other: Box) -> Box | None:
        """The elements in both boxes, or None if there are none."""
        if self.tensor != other.tensor:
            return None
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if start == self.start and stop == self.stop:  # most boxes are looked for where they lie as a whole
            return self
        return Box(self.tensor, start, stop) if all(map(lt, start, stop)) else None


def subtract(box: Box, other: Box) -> tuple[Box, ...]:
    """What is left of `box` outside `other`, as disjoint boxes (at most two per dimension)."""
    common = box.overlap(other)
    if common is None:
        return (box,)
    pieces = []
    for axis, (low, high) in enumerate(zip(common.start, common.stop, strict=True)):
        if box.start[axis] < low:
            pieces.append(_with_range(box, axis, box.start[axis], low))
        if high < box.stop[axis]:
            pieces.append(_with_range(box, axis, high, box.stop[axis]))
        if pieces:
            box = _with_range(box, axis, low, high)
    return tuple(pieces)


def _with_range(box: Box, axis: int, low: int, high: int) -> Box:
    start = (*box.start[:axis], low, *box.start[axis + 1 :])
    return Box(box.tensor, start, (*box.stop[:axis], high, *box.stop[axis + 1 :]))


@dataclass(frozen=True, slots=True, order=True)
class KvBox:
    """Half-open ranges of decoder layers and KV heads of the cache."""

    layers: tuple[int, int]
    heads: tuple[int, int]

    @property
    def cells(self) -> int:
        """Number of (layer, KV head) pairs inside."""
        return (self.layers[1] - self.layers[0]) * (self.heads[1] - self.heads[0])

    def overlap(self, other: KvBox) -> KvBox | None:
        """The (layer, head) pairs in both boxes, or None if there are none."""
        common = _kv_as_box(self).overlap(_kv_as_box(other))
        return _box_as_kv(common) if common else None


def _kv_as_box(kv: KvBox) -> Box:
    return Box("kv", (kv.layers[0], kv.heads[0]), (kv.layers[1], kv.heads[1]))


def _box_as_kv(box: Box) -> KvBox:
    return KvBox((box.start[0], box.stop[0]), (box.start[1], box.stop[1]))


def weight_boxes(spec: ModelSpec, config: ParallelConfig, position: Position) -> tuple[Box, ...]:
    """What a position keeps of the checkpoint, in checkpoint order; each element once."""
    layers = config.stage_layers(position.stage, spec.layers)
    ends = position.stage == 0, position.stage == config.stages - 1
    return _role_boxes(spec, layers, ends, position.shard, config.shards)


def weight_elements(spec: ModelSpec, config: ParallelConfig, position: Position) -> int:
    """Elements of `weight_boxes`."""
    layers = config.stage_layers(position.stage, spec.layers)
    ends = position.stage == 0, position.stage == config.stages - 1
    return _role_elements(spec, layers, ends, position.shard, config.shards)


@lru_cache(maxsize=4096)
def _role_elements(spec: ModelSpec, layers: tuple[int, int], ends: tuple[bool, bool], shard: int, shards: int) -> int:
    return sum(box.elements for box in _role_boxes(spec, layers, ends, shard, shards))


@lru_cache(maxsize=1024)
def _role_boxes(
    spec: ModelSpec, layers: tuple[int, int], ends: tuple[bool, bool], shard: int, shards: int
) -> tuple[Box, ...]:
    first, last = ends
    return tuple(
        box
        for tensor in _all_tensors(spec)
        if (tensor.first and first) or (tensor.last and last) or (_in_layers(tensor, layers))
        if (box := _shard_box(spec, tensor, shard, shards)).elements
    )


@lru_cache(maxsize=16)
def _all_tensors(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    return tensors(spec)


def _in_layers(tensor: TensorSpec, layers: tuple[int, int]) -> bool:
    return tensor.layer is not None and layers[0] <= tensor.layer < layers[1]


def _shard_box(spec: ModelSpec, tensor: TensorSpec, shard: int, shards: int) -> Box:
    start, stop = [0] * len(tensor.shape), list(tensor.shape)
    if tensor.unit is not None:
        start[tensor.dim], stop[tensor.dim] = unit_range(spec, tensor.unit, shard, shards)
    return Box(tensor.name, tuple(start), tuple(stop))


def kv_extent(spec: ModelSpec, config: ParallelConfig, position: Position) -> KvBox:
    """Layers and KV heads whose cache a position keeps for every request of its replica."""
    return KvBox(
        layers=config.stage_layers(position.stage, spec.layers),
        heads=kv_head_range(spec, position.shard, config.shards),
    )


def layout_boxes(spec: ModelSpec, layout: Layout) -> dict[Device, tuple[Box, ...]]:
    """`weight_boxes` of every device of a layout."""
    return {device: weight_boxes(spec, layout.config, position) for position, device in layout.bound()}


def replica_extents(spec: ModelSpec, layout: Layout, replica: int) -> dict[Device, KvBox]:
    """`kv_extent` of every device of one replica."""
    return {
        device: kv_extent(spec, layout.config, position)
        for position, device in layout.bound()
        if position.replica == replica
    }


def locality(source: Device, destination: Device) -> int:
    """Distance between devices: 0 the same device, 1 the same instance, 2 another instance."""
    return 0 if source == destination else 1 if source.instance == destination.instance else 2


@dataclass(frozen=True, slots=True)
class Transfer:
    """Disjoint boxes that go from one device (None: from the checkpoint on disk) to another."""

    source: Device | None
    destination: Device
    boxes: tuple[Box, ...]

    @property
    def elements(self) -> int:
        """Number of elements that move."""
        return sum(box.elements for box in self.boxes)


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """How every device comes to hold the boxes it needs, exactly once each.

    `local` transfers have source = destination: bytes that are already there, though possibly in
    another buffer. `transfers` are what must be sent or read, in (destination, source) order; `relays` go on,
    within an instance, from where these have brought them.
    """

    local: tuple[Transfer, ...]
    transfers: tuple[Transfer, ...]
    relays: tuple[Transfer, ...]
    local_bytes: int
    intra_instance_bytes: int
    inter_instance_bytes: int
    disk_bytes: int

    @property
    def moved_bytes(self) -> int:
        """Bytes that reach a device which did not hold them."""
        return self.intra_instance_bytes + self.inter_instance_bytes + self.disk_bytes


def weight_transfers(
    needed: Mapping[Device, Sequence[Box]],
    held: Mapping[Device, Sequence[Box]],
    *,
    element_bytes: int,
    distance: Distance = locality,
) -> WeightPlan:
    """Cover every needed box by disjoint pieces from the nearest holders, else from disk.

    A device's own boxes come first, then those of the nearest devices; among equally near
    holders the one that has sent least so far, then the lowest. What several devices of an instance
    need from outside comes once (`relays`). Needed boxes of one device must be disjoint.
    """
    cover = _Cover(held, distance)
    routes = [
        Route(source, destination, piece)
        for destination in sorted(needed)
        for box in needed[destination]
        for source, piece in cover.pieces(destination, box)
    ]
    first, second = relay(routes, lambda box: box.elements)
    return _summarise(_grouped(first), _grouped(second), element_bytes)


def _grouped(routes: Iterable[Route[Box]]) -> list[Transfer]:
    """In (destination, source) order; the boxes of each in the order of the routes."""
    grouped: dict[tuple[Device, Device | None], list[Box]] = defaultdict(list)
    for route in routes:
        grouped[route.destination, route.source].append(route.piece)
    found = [Transfer(source, destination, tuple(boxes)) for (destination, source), boxes in grouped.items()]
    return sorted(found, key=lambda one: (one.destination, one.source is None, one.source))


def _summarise(found: Sequence[Transfer], relays: Sequence[Transfer], element_bytes: int) -> WeightPlan:
    totals = Counter[int]()
    for one in (*found, *relays):
        totals[_kind(one)] += element_bytes * one.elements
    return WeightPlan(
        local=tuple(transfer for transfer in found if not _kind(transfer)),
        transfers=tuple(transfer for transfer in found if _kind(transfer)),
        relays=tuple(relays),
        local_bytes=totals[0],
        intra_instance_bytes=totals[1],
        inter_instance_bytes=totals[2],
        disk_bytes=totals[3],
    )


def _kind(transfer: Transfer) -> int:
    return 3 if transfer.source is None else locality(transfer.source, transfer.destination)


@dataclass(frozen=True, slots=True)
class KvTransfer:
    """Cache of some layers and KV heads that goes from one device to another (or stays: the same device)."""

    source: Device
    destination: Device
    layers: tuple[int, int]
    heads: tuple[int, int]


def kv_transfers(
    needed: Mapping[Device, KvBox], held: Mapping[Device, KvBox | Sequence[KvBox]], *, distance: Distance = locality
) -> tuple[KvTransfer, ...] | None:
    """Cover the cache extent of every device of a request's new replica from what is left, each cell once.

    `held` lists what each device still has, in its cache or as a copy. Every transfer lies within one
    held box of its source. Returns None if some cell survives nowhere: the request must be replayed.
    Sources are chosen as in `weight_transfers`.
    """
    boxes = {device: [kv] if isinstance(kv, KvBox) else kv for device, kv in held.items()}
    cover = _Cover({device: [_kv_as_box(kv) for kv in kvs] for device, kvs in boxes.items()}, distance)
    result = []
    for destination in sorted(needed):
        for source, piece in cover.pieces(destination, _kv_as_box(needed[destination])):
            if source is None:
                return None
            kv = _box_as_kv(piece)
            result.append(KvTransfer(source, destination, kv.layers, kv.heads))
    return tuple(result)


class _Cover:
    """Finds pieces of needed boxes among held ones and remembers how much each device has sent."""

    def __init__(self, held: Mapping[Device, Sequence[Box]], distance: Distance) -> None:
        self._distance = distance
        self._sent: dict[Device, int] = dict.fromkeys(held, 0)
        self._own = {device: _by_tensor(boxes) for device, boxes in held.items()}
        self._holders: dict[str, dict[Box, list[Device]]] = defaultdict(lambda: defaultdict(list))
        for device in sorted(held):
            for box in held[device]:
                self._holders[box.tensor][box].append(device)

    def pieces(self, destination: Device, box: Box) -> Iterator[tuple[Device | None, Box]]:
        """Disjoint pieces of `box` with their source, None where nobody holds them."""
        remaining = [box]
        for own in self._own.get(destination, {}).get(box.tensor, ()):
            taken, remaining = _take(remaining, own)
            yield from ((destination, piece) for piece in taken)
        while remaining:
            part = remaining.pop()
            best = self._nearest(destination, part)
            if best is None:
                yield None, part
                continue
            source, piece = best
            self._sent[source] += piece.elements
            remaining.extend(subtract(part, piece))
            yield source, piece

    def _nearest(self, destination: Device, part: Box) -> tuple[Device, Box] | None:
        candidates = [
            (self._distance(device, destination), self._sent[device], device, common)
            for held, devices in self._holders.get(part.tensor, {}).items()
            if (common := part.overlap(held)) is not None
            for device in devices
        ]
        if not candidates:
            return None
        _, _, source, piece = min(candidates)
        return source, piece


def _by_tensor(boxes: Sequence[Box]) -> dict[str, list[Box]]:
    result: dict[str, list[Box]] = defaultdict(list)
    for box in boxes:
        result[box.tensor].append(box)
    return result


def _take(remaining: Sequence[Box], held: Box) -> tuple[list[Box], list[Box]]:
    taken = [common for part in remaining if (common := part.overlap(held)) is not None]
    return taken, [left for part in remaining for left in subtract(part, held)]
