"""From a transition to the messages that carry it out: pure translation, one worker at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.layout import Device, Layout
from data.models import ModelSpec, kv_head_range
from planning.resharding import KvBox, KvTransfer, kv_transfers, replica_extents
from planning.transition import Transition
from serving import messages as m
from serving.controller.dispatch import Replica
from serving.settings import EngineSettings

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def block_bytes(spec: ModelSpec, replica: Replica, engine: EngineSettings, rank: int) -> int:
    """Bytes of one KV block on rank `rank` of a replica: K and V of its layers and heads."""
    stage, shard = divmod(rank, replica.config.shards)
    first, last = replica.config.stage_layers(stage, spec.layers)
    low, high = kv_head_range(spec, shard, replica.config.shards)
    cell = 2 * engine.block_tokens * spec.head_dim * _DTYPE_BYTES[engine.dtype]
    return (last - first) * (high - low) * cell


def kv_blocks(spec: ModelSpec, replica: Replica, engine: EngineSettings) -> int:
    """Blocks of every rank's cache: the same number, set by the rank with the largest blocks, and
    never more than `max_batch` full contexts need."""
    if engine.kv_blocks:
        return engine.kv_blocks
    widest = max(block_bytes(spec, replica, engine, rank) for rank in range(len(replica.devices)))
    useful = replica.config.max_batch * -(-spec.max_positions // engine.block_tokens)
    return max(1, min(engine.kv_memory_bytes // widest, useful))


def world_of(transition: Transition, new: Sequence[Replica], retired: Sequence[Replica]) -> tuple[Device, ...]:
    """Everyone who takes part: new positions, devices that still hold KV, and sources of weights."""
    members = {device for replica in (*new, *retired) for device in replica.devices}
    for transfer in transition.weights.transfers:
        members |= {transfer.destination} | ({transfer.source} if transfer.source else set())
    return tuple(sorted(members))


def prepare_orders(
    epoch: int, store: str, transition: Transition, new: Sequence[Replica], world: Sequence[Device]
) -> dict[Device, m.Prepare]:
    """One `Prepare` for every member of the world."""
    sends: dict[Device, list[m.WeightPieces]] = defaultdict(list)
    receives: dict[Device, list[m.WeightPieces]] = defaultdict(list)
    for transfer in transition.weights.transfers:
        boxes = list(transfer.boxes)
        source = str(transfer.source) if transfer.source else None
        receives[transfer.destination].append(m.WeightPieces(source, boxes))
        if transfer.source is not None:
            sends[transfer.source].append(m.WeightPieces(str(transfer.destination), boxes))
    roles = {device: role for replica in new for device, role in _roles(replica).items()}
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
        )
        for device in world
    }


def _roles(replica: Replica) -> dict[Device, m.Role]:
    config = replica.config
    members = [str(device) for device in replica.devices]
    return {
        device: m.Role(
            replica.number,
            members,
            rank,
            config.stages,
            config.shards,
            config.max_batch,
            list(config.partition),
            replica.kv_blocks,
        )
        for rank, device in enumerate(replica.devices)
    }


def extents(spec: ModelSpec, replica: Replica) -> dict[Device, KvBox]:
    """Which KV every device of a replica keeps."""
    return replica_extents(spec, Layout(replica.config, replica.devices), 0)


@dataclass(frozen=True, slots=True)
class Adopted:
    """A sequence whose KV moves from one replica to another, and its block table there."""

    resident: m.Resident
    source: Replica
    target: Replica
    blocks: tuple[int, ...]


def adopt(
    residents: Mapping[int, Sequence[m.Resident]],
    heirs: Mapping[int, Replica],
    replicas: Mapping[int, Replica],
    block_tokens: int,
) -> list[Adopted]:
    """Give every resident sequence a place in the heir of its replica while the heir has room.

    `residents` by retired replica number; those without a place are replayed instead.
    """
    used: dict[int, int] = defaultdict(int)
    count: dict[int, int] = defaultdict(int)
    adopted = []
    for number in sorted(residents):
        heir = heirs.get(number)
        if heir is None:
            continue
        for resident in residents[number]:
            size = -(-resident.cached_tokens // block_tokens)
            start = used[heir.number]
            # One spare block per sequence: each must be able to take its next token.
            if count[heir.number] >= heir.config.max_batch or start + size + count[heir.number] + 1 > heir.kv_blocks:
                continue
            blocks = tuple(range(start, start + size))
            adopted.append(Adopted(resident, replicas[number], heir, blocks))
            used[heir.number] += size
            count[heir.number] += 1
    return adopted


def move_orders(epoch: int, spec: ModelSpec, adopted: Sequence[Adopted]) -> dict[Device, m.Move]:
    """The `Move` of every device that sends or receives KV; pieces in the same order on both sides."""
    sends: dict[Device, list[m.KvPiece]] = defaultdict(list)
    receives: dict[Device, list[m.KvPiece]] = defaultdict(list)
    routes: dict[tuple[int, int], tuple[KvTransfer, ...]] = {}
    for one in adopted:
        pair = one.source.number, one.target.number
        if pair not in routes:
            routes[pair] = kv_transfers(extents(spec, one.target), extents(spec, one.source)) or ()
        key, tokens = one.resident.key, one.resident.cached_tokens
        for route in routes[pair]:
            ranges = route.layers, route.heads
            there, here = str(route.destination), str(route.source)
            sends[route.source].append(m.KvPiece(there, key, tokens, list(one.resident.blocks), *ranges))
            receives[route.destination].append(m.KvPiece(here, key, tokens, list(one.blocks), *ranges))
    return {device: m.Move(epoch, sends[device], receives[device]) for device in sorted({*sends, *receives})}
