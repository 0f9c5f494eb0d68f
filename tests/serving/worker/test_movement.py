from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from data.layout import Device, ParallelConfig, Position
from data.models import ModelSpec
from planning.resharding import weight_boxes
from planning.transition import LiveReplica, plan_transition
from serving import messages as m
from serving.controller.dispatch import Replica
from serving.controller.orders import Heir, kv_pieces, live_sources, prepare_orders, world_of
from serving.controller.rendezvous import Rendezvous
from serving.controller.seating import Seating
from serving.engine.checkpoint import create_checkpoint
from tests.serving.worker.conftest import Members

DEVICES = tuple(Device(f"i{index}", 0) for index in range(3))
KV_BLOCKS, BLOCK_TOKENS = 24, 4
CONFIGS = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1)]


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelSpec]:
    path = tmp_path_factory.mktemp("model") / request.param
    shape = {"layers": 5, "hidden": 48, "heads": 6, "kv_heads": 3, "ffn": 80, "vocab": 300, "max_positions": 64}
    return path, create_checkpoint(str(path), family=request.param, **shape)


def move(members: Members, model: tuple[Path, ModelSpec], old: ParallelConfig, new: ParallelConfig, seed: int) -> None:
    """From `old` on some devices to `new` on some, with live sequences; every member checks what it got."""
    checkpoint, spec = model
    draw = random.Random(seed)
    before = tuple(draw.sample(DEVICES, old.devices))
    resident = {device: weight_boxes(spec, old, _position(old, rank)) for rank, device in enumerate(before)}
    usable = draw.sample(DEVICES, draw.randint(new.devices, 3))
    live = [LiveReplica(1, old, before, 10)]
    transition = plan_transition(spec, new, live=live, usable=usable, resident=resident, element_bytes=4)
    if transition.empty:
        return
    retired = Replica(1, 1, old, before, KV_BLOCKS)
    replica = Replica(2, 2, transition.new[0].config, transition.new[0].devices, KV_BLOCKS)
    world = world_of(transition, [replica, retired])
    store = Rendezvous("127.0.0.1", 10.0)
    prepares = prepare_orders(2, store.address, transition, [replica], world)
    heirs = _heirs(spec, draw, retired, replica)
    split = {heir.key: draw.randint(0, heir.tokens) for heir in heirs}  # what is copied first
    first = kv_pieces({"": spec}, [replace(heir, tokens=split[heir.key]) for heir in heirs], {})
    rest = kv_pieces({"": spec}, heirs, split)
    tasks = {}
    for rank, device in enumerate(world):
        options = {
            "checkpoint": str(checkpoint),
            "old": old.to_json() if device in before else None,
            "new": new.to_json() if device in replica.devices else None,
            "before": before.index(device) if device in before else 0,
            "after": replica.devices.index(device) if device in replica.devices else 0,
            "prepare": _text(prepares[device]),
            "copy": _text(m.Copy(2, first[0].get(device, []), first[1].get(device, []))),
            "switch": _text(m.Switch(2, rest[0].get(device, []), rest[1].get(device, []), [], [])),
            "kv_blocks": KV_BLOCKS,
        }
        tasks[rank] = ("move", options)
    members.begin(store, tasks, size=len(world))
    outcomes = [members.outcome(rank) for rank in tasks]
    store.close()
    assert [(outcome.result, outcome.broken) for outcome in outcomes] == [(True, "")] * len(world), (old, new, seed)


def _position(config: ParallelConfig, rank: int) -> Position:
    return Position(0, *divmod(rank, config.shards))


def _text(order: m.Message) -> str:
    return msgspec.msgpack.encode(order).hex()


def _heirs(spec: ModelSpec, draw: random.Random, source: Replica, target: Replica) -> list[Heir]:
    seating = Seating(KV_BLOCKS, BLOCK_TOKENS)
    residents = _residents(draw)
    assert all(seating.fit(one.key, one.cached_tokens, 10_000) for one in residents)
    return [
        Heir(one.key, one.cached_tokens, live_sources(spec, source, one), target, tuple(seating.seats[one.key]))
        for one in residents
    ]


def _residents(draw: random.Random) -> list[m.Resident]:
    free = draw.sample(range(KV_BLOCKS), 16)
    sizes = [draw.randint(1, 4) for _ in range(4)]
    return [
        m.Resident(key, count * BLOCK_TOKENS - draw.randint(0, 3), [free.pop() for _ in range(count)])
        for key, count in enumerate(sizes, start=1)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_moved_weights_and_kv_equal_loaded_ones(members: Members, model: tuple[Path, ModelSpec], seed: int) -> None:
    pairs = [(old, new) for old in CONFIGS for new in CONFIGS]
    for at, (old, new) in enumerate(random.Random(seed).sample(pairs, 9)):
        configs = [ParallelConfig(1, stages, shards, 4) for stages, shards in (old, new)]
        move(members, model, configs[0], configs[1], 100 * seed + at)
