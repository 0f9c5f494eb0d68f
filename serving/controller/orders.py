"""From a transition to the messages that carry it out: pure translation, one worker at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.layout import Device, Layout
from data.models import ModelSpec, kv_head_range
from planning.resharding import KvBox, KvTransfer, kv_transfers, replica_extents
from planning.transition import Transition
from serving import messages as m
from serving.controller.dispatch import Replica
from serving.settings import EngineSettings


def block_bytes(spec: ModelSpec, replica: Replica, engine: EngineSettings, rank: int) -> int:
    """Bytes of one KV block on rank `rank` of a replica: K and V of its layers and heads."""
    stage, shard = divmod(rank, replica.config.shards)
    first, last = replica.config.stage_layers(stage, spec.layers)
    low, high = kv_head_range(spec, shard, replica.config.shards)
    cell = 2 * engine.block_tokens * spec.head_dim * engine.element_bytes
    return (last - first) * (high - low) * cell


def kv_blocks(spec: ModelSpec, replica: Replica, engine: EngineSettings) -> int:
    """Blocks of every rank's cache: the same number, set by the rank with the largest blocks, and
    never more than `max_batch` full contexts need. A replica has its share of what the group may have."""
    if engine.kv_blocks:
        return max(1, int(engine.kv_blocks * replica.kv_share))
    widest = max(block_bytes(spec, replica, engine, rank) for rank in range(len(replica.devices)))
    useful = replica.config.max_batch * -(-spec.max_positions // engine.block_tokens)
    return max(1, min(int(engine.kv_memory_bytes * replica.kv_share) // widest, useful))


def world_of(transition: Transition, replicas: Sequence[Replica], holders: Iterable[Device] = ()) -> tuple[Device, ...]:
    """Everyone who takes part: the devices of `replicas` (new, retired, joined), others that hold KV, and sources
    of weights."""
    members = {device for replica in replicas for device in replica.devices} | set(holders)
    for transfer in transition.weights.transfers:
        members |= {transfer.destination} | ({transfer.source} if transfer.source else set())
    return tuple(sorted(members))


def prepare_orders(
    epoch: int,
    store: str,
    transition: Transition,
    new: Sequence[Replica],
    world: Sequence[Device],
    *,
    hurry: bool = False,
) -> dict[Device, m.Prepare]:
    """One `Prepare` for every member of the world; `hurry` as there."""
    sends: dict[Device, list[m.WeightPieces]] = defaultdict(list)
    receives: dict[Device, list[m.WeightPieces]] = defaultdict(list)
    weights = transition.weights
    relayed = [*((one, False) for one in weights.transfers), *((one, True) for one in weights.relays)]
    for transfer, late in relayed:
        boxes = list(transfer.boxes)
        source = str(transfer.source) if transfer.source else None
        receives[transfer.destination].append(m.WeightPieces(source, boxes, late))
        if transfer.source is not None:
            sends[transfer.source].append(m.WeightPieces(str(transfer.destination), boxes, late))
    groups: dict[tuple[Device, ...], list[Replica]] = defaultdict(list)
    for replica in new:
        groups[replica.devices].append(replica)
    roles = {device: role for group in groups.values() for device, role in _roles(group).items()}
    names = [str(device) for device in world]
    return {
        device: m.Prepare(
            epoch,
            store,
            names,
            roles.get(device),
            list(transition.needed.get(device, ())),
            sends[device],
            receives[device],
            hurry,
        )
        for device in world
    }


def _roles(group: Sequence[Replica]) -> dict[Device, m.Role]:
    """The role of every device of a group, whose replicas share its devices and its shape."""
    config, devices = group[0].config, group[0].devices
    members = [str(device) for device in devices]
    hosted = [
        m.Hosted(one.number, one.model, one.config.max_batch, list(one.config.partition), one.kv_blocks)
        for one in group
    ]
    return {device: m.Role(members, rank, config.stages, config.shards, hosted) for rank, device in enumerate(devices)}


def extents(spec: ModelSpec, replica: Replica) -> dict[Device, KvBox]:
    """Which KV every device of a replica keeps."""
    return replica_extents(spec, Layout(replica.config, replica.devices), 0)


@dataclass(frozen=True, slots=True)
class Source:
    """KV of a sequence on a device: of which layers and heads, how many tokens, in which replica's cache or copy.

    Copies are told apart by their `table`.
    """

    device: Device
    box: KvBox
    tokens: int
    replica: int
    kept: bool
    blocks: tuple[int, ...]
    table: int = 0


@dataclass(frozen=True, slots=True)
class Heir:
    """A sequence whose first `tokens` tokens of KV go to `target`, into `blocks`, from any of `sources`."""

    key: int
    tokens: int
    sources: tuple[Source, ...]
    target: Replica
    blocks: tuple[int, ...]


def live_sources(spec: ModelSpec, replica: Replica, resident: m.Resident) -> tuple[Source, ...]:
    """A sequence in a replica whose devices all work."""
    blocks = tuple(resident.blocks)
    return tuple(
        Source(device, box, resident.cached_tokens, replica.number, kept=False, blocks=blocks)
        for device, box in extents(spec, replica).items()
    )


def found_sources(held: Mapping[Device, Sequence[m.Holding]]) -> dict[int, list[Source]]:
    """What a survey found, by sequence."""
    found: dict[int, list[Source]] = defaultdict(list)
    for device, holdings in held.items():
        for one in holdings:
            box = KvBox(one.layers, one.heads)
            blocks = tuple(one.blocks)
            found[one.key].append(Source(device, box, one.tokens, one.replica, one.kept, blocks, one.table))
    return dict(found)


class Lane(NamedTuple):
    """A way that KV of some sequences takes, from a cache (or a copy) of one replica into that of another."""

    source: Device
    destination: Device
    replica: int
    kept: bool
    target: int
    layers: tuple[int, int]
    heads: tuple[int, int]


Pieces = dict[Device, list[m.KvPieces]]


def kv_pieces(
    specs: Mapping[str, ModelSpec], heirs: Sequence[Heir], starts: Mapping[int, int]
) -> tuple[Pieces, Pieces]:
    """What every device sends and what it receives so that tokens `starts[key]` (default 0) … are in place.

    `specs` are the models by name. Pieces between one pair of devices are in the same order on both sides.
    """
    lanes: dict[Lane, list[tuple[m.KvSpan, m.KvSpan]]] = defaultdict(list)
    routes = _Routes(specs)
    for heir in heirs:
        start = starts.get(heir.key, 0)
        if start < heir.tokens:
            for source, one in routes.of(heir):
                lane = Lane(
                    one.source, one.destination, source.replica, source.kept, heir.target.number, one.layers, one.heads
                )
                spans = (m.KvSpan(heir.key, start, heir.tokens, list(side.blocks)) for side in (source, heir))
                lanes[lane].append(tuple(spans))  # type: ignore[arg-type]
    sends: Pieces = defaultdict(list)
    receives: Pieces = defaultdict(list)
    for lane, pairs in lanes.items():
        box = lane.layers, lane.heads
        there, here = str(lane.destination), str(lane.source)
        sends[lane.source].append(m.KvPieces(there, lane.replica, lane.kept, *box, [out for out, _ in pairs]))
        receives[lane.destination].append(m.KvPieces(here, lane.target, False, *box, [into for _, into in pairs]))
    return sends, receives


class _Routes:
    """Which device sends which layers and heads; sequences in the same places share their routes."""

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        self._specs = specs
        self._known: dict[object, tuple[tuple[int, KvTransfer], ...]] = {}

    def of(self, heir: Heir) -> list[tuple[Source, KvTransfer]]:
        """Pairs of a source and what it sends of the sequence."""
        usable = [source for source in heir.sources if source.tokens >= heir.tokens]
        pattern = heir.target.number, tuple((one.device, one.box, one.replica, one.kept) for one in usable)
        if pattern not in self._known:
            self._known[pattern] = tuple(self._route(usable, heir.target))
        return [(usable[index], transfer) for index, transfer in self._known[pattern]]

    def _route(self, usable: Sequence[Source], target: Replica) -> Iterator[tuple[int, KvTransfer]]:
        held: dict[Device, list[KvBox]] = defaultdict(list)
        for source in usable:
            held[source.device].append(source.box)
        for transfer in kv_transfers(extents(self._specs[target.model], target), held) or ():
            part = KvBox(transfer.layers, transfer.heads)
            # A cache on the device is read rather than a copy in its host memory.
            fitting = [
                (source.kept, index)
                for index, source in enumerate(usable)
                if source.device == transfer.source and source.box.overlap(part) == part
            ]
            yield min(fitting)[1], transfer
