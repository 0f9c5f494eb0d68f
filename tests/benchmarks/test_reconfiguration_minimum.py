from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.reconfiguration.minimum import World, against, parsed
from benchmarks.reconfiguration.stage import config
from data.layout import Device
from data.models import ModelSpec
from planning.transition import plan_transition

SPEC = ModelSpec(
    "m", "llama", layers=4, hidden=64, heads=8, kv_heads=4, head_dim=8, ffn=128, vocab=512, max_positions=512
)
DEVICES = [Device(f"i{number}", 0) for number in range(4)]
TOKEN_BYTES = 2 * SPEC.layers * SPEC.kv_heads * SPEC.head_dim * 4
LAYOUTS = ("1x1x1", "1x1x2", "1x2x1", "2x1x1", "1x1x4", "1x2x2", "2x1x2", "1x4x1")


def go(world: World, layout: str, tokens: int) -> Any:
    """Advance as the controller would: to the positions that its own planning gives."""
    target = config(layout, 8)
    plan = plan_transition(
        SPEC, target, live=world._with_tokens(tokens), usable=DEVICES, resident=world.resident, element_bytes=4
    )
    placed = {one.number: one.devices for one in world.live if one.number in plan.keep}
    replicas = [*placed.values(), *(new.devices for new in plan.new)]
    positions = [
        {"replica": index, "stage": rank // target.shards, "shard": rank % target.shards, "device": str(device)}
        for index, devices in enumerate(replicas)
        for rank, device in enumerate(devices)
    ]
    return world.advance(target, DEVICES, tokens, {"positions": positions})


def test_two_shards_become_one() -> None:
    world = World(SPEC, 4)
    first = go(world, "1x1x2", 0)
    replicated = first.weights_bytes - SPEC.weight_bytes
    assert 0 <= replicated < SPEC.weight_bytes // 10, "norms and the like are on both"
    least = go(world, "1x1x1", 1000)
    assert least.kv_bytes == least.kv_staying_bytes == 500 * TOKEN_BYTES
    assert least.weights_bytes == pytest.approx(SPEC.weight_bytes / 2, rel=0.1)
    assert least.busiest_kv_bytes == least.kv_bytes


def test_what_stayed_in_memory_does_not_move_again() -> None:
    world = World(SPEC, 4)
    for layout in ("1x1x2", "1x1x1"):
        go(world, layout, 100)
    back = go(world, "1x1x2", 100)
    assert back.weights_bytes == 0
    assert back.kv_bytes == 50 * TOKEN_BYTES


def test_the_whole_model_on_every_device_moves_no_weights() -> None:
    world = World(SPEC, 4, whole_model_resident=True)
    for layout in LAYOUTS:
        assert go(world, layout, 10).weights_bytes == 0


def test_two_replicas_share_what_one_leaves() -> None:
    world = World(SPEC, 4)
    usable = DEVICES[:2]
    found = []
    for layout in ("1x1x2", "2x1x1", "1x1x2"):
        target = config(layout, 8)
        plan = plan_transition(
            SPEC, target, live=world._with_tokens(400), usable=usable, resident=world.resident, element_bytes=4
        )
        positions = [
            {"replica": at, "stage": 0, "shard": rank, "device": str(device)}
            for at, new in enumerate(plan.new)
            for rank, device in enumerate(new.devices)
        ]
        least = world.advance(target, usable, 400, {"positions": positions})
        found.append((least.kv_bytes // TOKEN_BYTES, least.busiest_kv_bytes // TOKEN_BYTES))
    assert found == [(0, 0), (200, 100), (200, 100)], "each device gets and gives half of what moves"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(LAYOUTS), min_size=2, max_size=4), st.integers(1, 100))
def test_no_kv_arrives_twice_and_of_one_replica_all_does(chain: list[str], quarter: int) -> None:
    tokens = 4 * quarter
    world = World(SPEC, 4)
    go(world, chain[0], 0)
    for before, after in pairwise(chain):
        least = go(world, after, tokens)
        placed = least.kv_bytes + least.kv_staying_bytes
        assert placed <= tokens * TOKEN_BYTES
        if before != after and before[0] == after[0] == "1":
            assert placed == tokens * TOKEN_BYTES
        assert least.busiest_kv_bytes <= least.kv_bytes


def test_the_event_beside_the_fewest() -> None:
    world = World(SPEC, 4)
    go(world, "1x1x2", 0)
    least = go(world, "1x1x1", 1000)
    moved = {"weights_inter_bytes": least.weights_bytes, "kv_bytes": least.kv_bytes}
    seconds = {"prepare": 9.0, "transfer": 9.0, "weights": 2.0, "kv": 0.5}
    exact = against(moved, seconds, least)
    assert exact["excess"] == 0.0
    assert exact["kv_rate"] == least.kv_bytes * 2
    assert exact["weights_rate"] == round(least.busiest_weights_bytes / 2)
    assert against({**moved, "weights_disk_bytes": least.kv_bytes}, seconds, least)["excess"] > 0.02


def test_devices_are_read_back() -> None:
    assert parsed("i3/0") == DEVICES[3]
