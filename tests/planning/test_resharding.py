"""Transfers between layouts cover what is needed exactly once and take the nearest source."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.layout import Device, Layout, ParallelConfig
from data.models import ModelSpec, tensors
from planning.resharding import (
    Box,
    KvBox,
    kv_transfers,
    layout_boxes,
    replica_extents,
    subtract,
    weight_boxes,
    weight_transfers,
)

LLAMA = ModelSpec("tiny", "llama", 5, 24, 6, 2, 4, 37, 29, 64)
TIED = ModelSpec("tied", "opt", 5, 24, 6, 6, 4, 48, 31, 64, tied_embeddings=True, qkv_bias=True, output_bias=True)


@st.composite
def configs(draw: st.DrawFn, most_replicas: int = 2) -> ParallelConfig:
    stages = draw(st.integers(1, 5))
    cuts = sorted(draw(st.sets(st.integers(1, 4), min_size=stages - 1, max_size=stages - 1)))
    partition = tuple(high - low for low, high in zip((0, *cuts), (*cuts, 5), strict=True))
    return ParallelConfig(draw(st.integers(1, most_replicas)), stages, draw(st.integers(1, 6)), 4, partition)


@st.composite
def layouts(draw: st.DrawFn, most_replicas: int = 2) -> Layout:
    config = draw(configs(most_replicas))
    devices = [Device(f"i{index // 4}", index % 4) for index in range(config.devices + draw(st.integers(0, 6)))]
    return Layout(config, tuple(draw(st.permutations(devices))[: config.devices]))


@st.composite
def boxes(draw: st.DrawFn, dimensions: int) -> Box:
    ranges = [sorted(draw(st.lists(st.integers(0, 6), min_size=2, max_size=2, unique=True))) for _ in range(dimensions)]
    return Box("t", tuple(low for low, _ in ranges), tuple(high for _, high in ranges))


def cells(box: Box) -> set[tuple[int, ...]]:
    return set(product(*(range(low, high) for low, high in zip(box.start, box.stop, strict=True))))


@given(st.integers(1, 3).flatmap(lambda n: st.tuples(boxes(n), boxes(n))))
def test_subtract_and_overlap_are_set_operations(pair: tuple[Box, Box]) -> None:
    box, other = pair
    pieces, common = subtract(box, other), box.overlap(other)
    assert (cells(common) if common else set()) == cells(box) & cells(other)
    assert sum(piece.elements for piece in pieces) == len(cells(box) - cells(other))
    assert set().union(*map(cells, pieces)) == cells(box) - cells(other)


@given(configs(most_replicas=1), st.sampled_from([LLAMA, TIED]))
def test_positions_of_a_replica_hold_the_whole_model(config: ParallelConfig, spec: ModelSpec) -> None:
    counts = {tensor.name: np.zeros(tensor.shape, np.int32) for tensor in tensors(spec)}
    for position in config.positions():
        held = weight_boxes(spec, config, position)
        assert len({box.tensor for box in held}) == len(held)
        for box in held:
            counts[box.tensor][tuple(map(slice, box.start, box.stop))] += 1
    assert all((count >= 1).all() for count in counts.values())


def test_tied_embeddings_are_held_by_both_ends_and_once_by_a_single_stage() -> None:
    def holders(stages: int) -> list[int]:
        config = ParallelConfig(1, stages, 1, 1)
        return [
            sum(box.tensor.endswith("embed_tokens.weight") for box in weight_boxes(TIED, config, position))
            for position in config.positions()
        ]

    assert holders(1) == [1]
    assert holders(3) == [1, 0, 1]


@settings(max_examples=40, deadline=None)
@given(layouts(), layouts(), st.sampled_from([LLAMA, TIED]), st.integers(0, 3))
def test_weight_transfers_cover_each_need_once(old: Layout, new: Layout, spec: ModelSpec, lost: int) -> None:
    held = {device: has for device, has in layout_boxes(spec, old).items() if device.instance != f"i{lost}"}
    needed = layout_boxes(spec, new)
    plan = weight_transfers(needed, held, element_bytes=spec.dtype_bytes)
    for device, wanted in needed.items():
        got = [(t.source, box) for t in (*plan.local, *plan.transfers) if t.destination == device for box in t.boxes]
        late = [(t.source, box) for t in plan.relays if t.destination == device for box in t.boxes]
        assert sum(box.elements for _, box in got + late) == sum(box.elements for box in wanted)
        assert all(one.overlap(other) is None for (_, one), (_, other) in combinations(got + late, 2))
        for neighbour, box in late:
            assert neighbour is not None
            assert neighbour.instance == device.instance
            assert any(box in t.boxes for t in plan.transfers if t.destination == neighbour)
        assert all(any(box.overlap(want) == box for want in wanted) for _, box in got)
        for source, box in got:
            own = source == device
            assert own or all(box.overlap(has) is None for has in held.get(device, ()))
            if source is None:
                assert all(box.overlap(has) is None for every in held.values() for has in every)
            else:
                assert any(box.overlap(has) == box for has in held[source])
    total = sum(box.elements for every in needed.values() for box in every) * spec.dtype_bytes
    assert plan.local_bytes + plan.moved_bytes == total


@settings(max_examples=40, deadline=None)
@given(layouts(), layouts())
def test_far_sources_send_only_what_near_ones_lack(old: Layout, new: Layout) -> None:
    held, needed = layout_boxes(LLAMA, old), layout_boxes(LLAMA, new)
    for transfer in weight_transfers(needed, held, element_bytes=4).transfers:
        if transfer.source is not None and transfer.source.instance != transfer.destination.instance:
            near = [has for device, has in held.items() if device.instance == transfer.destination.instance]
            assert all(box.overlap(has) is None for box in transfer.boxes for every in near for has in every)


def test_equal_sources_share_the_sending() -> None:
    config = ParallelConfig(2, 1, 1, 1)
    old = Layout(config, (Device("a", 0), Device("b", 0)))
    new = Layout(config, (Device("c", 0), Device("d", 0)))
    plan = weight_transfers(layout_boxes(LLAMA, new), layout_boxes(LLAMA, old), element_bytes=4)
    sent = [sum(t.elements for t in plan.transfers if t.source == device) for device in old.devices]
    assert sum(sent) * 4 == 2 * LLAMA.weight_bytes == plan.inter_instance_bytes
    assert abs(sent[0] - sent[1]) * 4 <= LLAMA.weight_bytes // 5


def test_an_instance_gets_one_copy_and_passes_it_on() -> None:
    """Four replicas on an instance, from a replica elsewhere and from disk: the network carries one model, not four."""
    old = Layout(ParallelConfig(1, 1, 2, 1), (Device("a", 0), Device("a", 1)))
    new = Layout(ParallelConfig(4, 1, 1, 1), tuple(Device("b", index) for index in range(4)))
    for held in (layout_boxes(LLAMA, old), {}):
        plan = weight_transfers(layout_boxes(LLAMA, new), held, element_bytes=4)
        assert plan.moved_bytes == 4 * LLAMA.weight_bytes
        assert plan.inter_instance_bytes + plan.disk_bytes == LLAMA.weight_bytes
        assert all(one.source in new.devices for one in plan.relays)
        fetched = [sum(t.elements for t in plan.transfers if t.destination == device) for device in new.devices]
        assert max(fetched) - min(fetched) <= max(box.elements for box in layout_boxes(LLAMA, new)[new.devices[0]])


def test_nobody_holds_it_so_it_comes_from_disk() -> None:
    new = Layout(ParallelConfig(1, 2, 2, 1), tuple(Device("a", index) for index in range(4)))
    plan = weight_transfers(layout_boxes(LLAMA, new), {}, element_bytes=4)
    assert {transfer.source for transfer in plan.transfers} == {None}
    assert plan.disk_bytes == LLAMA.weight_bytes <= plan.moved_bytes  # what shards replicate is read once
    assert plan.moved_bytes == plan.disk_bytes + plan.intra_instance_bytes


@settings(max_examples=60, deadline=None)
@given(layouts(), layouts(), st.sampled_from([LLAMA, TIED]), st.data())
def test_kv_transfers_cover_every_cell_once(old: Layout, new: Layout, spec: ModelSpec, data: st.DataObject) -> None:
    held = replica_extents(spec, old, data.draw(st.integers(0, old.config.replicas - 1)))
    needed = replica_extents(spec, new, data.draw(st.integers(0, new.config.replicas - 1)))
    moves = kv_transfers(needed, held)
    assert moves is not None
    for device, extent in needed.items():
        got = [(move.source, KvBox(move.layers, move.heads)) for move in moves if move.destination == device]
        assert sum(kv.cells for _, kv in got) == extent.cells
        assert all(one.overlap(other) is None for (_, one), (_, other) in combinations(got, 2))
        for source, kv in got:
            assert kv.overlap(extent) == kv == kv.overlap(held[source])
            if source != device and device in held:
                assert held[device].overlap(kv) is None


def test_lost_cache_means_replay() -> None:
    old = Layout(ParallelConfig(1, 2, 1, 1), (Device("a", 0), Device("b", 0)))
    held = replica_extents(LLAMA, old, 0)
    del held[Device("b", 0)]
    assert kv_transfers(replica_extents(LLAMA, old, 0), held) is None
