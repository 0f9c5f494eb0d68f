from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from data.errors import Infeasible
from data.layout import Device, ParallelConfig, Position
from planning.resharding import Box, subtract, weight_boxes
from planning.transition import LiveReplica, common, plan_transition, retained
from tests.planning.fleets import SPEC, Scene, scenes

A, B, C, D = (Device("i", index) for index in range(4))


def left_over(box: Box, pieces: list[Box]) -> list[Box]:
    remaining = [box]
    for piece in pieces:
        remaining = [part for one in remaining for part in subtract(one, piece)]
    return remaining


@settings(deadline=None)
@given(scene=scenes())
def test_every_live_replica_is_kept_or_retired_and_the_target_is_complete(scene: Scene) -> None:
    transition = scene.transition()
    numbers = [replica.number for replica in scene.live]
    assert sorted((*transition.keep, *transition.retire)) == sorted(numbers)
    assert len(transition.keep) + len(transition.new) == scene.target.replicas
    kept = {replica.number: replica for replica in scene.live if replica.number in transition.keep}
    for replica in kept.values():
        assert replica.config == replace(scene.target, replicas=1)
        assert set(replica.devices) <= set(scene.usable)
    devices = [device for group in (*kept.values(), *transition.new) for device in group.devices]
    assert len(devices) == len(set(devices)) == scene.target.devices
    assert set(devices) <= set(scene.usable)
    heirs = [number for new in transition.new for number in new.inherits]
    assert len(heirs) == len(set(heirs))
    assert set(heirs) <= set(transition.retire)
    if not transition.keep:
        assert sorted(heirs) == sorted(transition.retire)


@settings(deadline=None)
@given(scene=scenes())
def test_every_needed_byte_has_one_source_that_holds_it(scene: Scene) -> None:
    transition = scene.transition()
    new = {device: rank for one in transition.new for rank, device in enumerate(one.devices)}
    assert transition.needed.keys() == new.keys()
    pieces: dict[Device, list[Box]] = {device: [] for device in new}
    weights = transition.weights
    brought: dict[Device, list[Box]] = {device: [] for device in new}
    for transfer in weights.transfers:
        brought[transfer.destination] += transfer.boxes
    for transfer in (*weights.local, *weights.transfers, *weights.relays):
        pieces[transfer.destination] += transfer.boxes
        if transfer.source is not None:
            late = transfer in weights.relays
            for box in transfer.boxes:
                held = brought[transfer.source] if late else scene.resident[transfer.source]
                assert any(one.overlap(box) == box for one in held)
    for device, rank in new.items():
        position = Position(0, rank // scene.target.shards, rank % scene.target.shards)
        assert transition.needed[device] == weight_boxes(SPEC, scene.target, position)
        for box in transition.needed[device]:
            of_tensor = [piece for piece in pieces[device] if piece.tensor == box.tensor]
            assert not left_over(box, of_tensor)
            assert sum(piece.elements for piece in of_tensor) == box.elements


@settings(deadline=None)
@given(scene=scenes())
def test_what_is_in_place_stays_untouched(scene: Scene) -> None:
    transition = scene.transition()
    shapes = {(replica.config.shape, replica.config.max_batch) for replica in scene.live}
    held = all(
        scene.resident.get(device)
        == weight_boxes(SPEC, replica.config, Position(0, *divmod(rank, scene.target.shards)))
        for replica in scene.live
        for rank, device in enumerate(replica.devices)
        if replica.config.shape == scene.target.shape
    )
    usable = all(set(replica.devices) <= set(scene.usable) for replica in scene.live)
    if held and usable and shapes <= {(scene.target.shape, scene.target.max_batch)}:
        assert len(transition.keep) == min(len(scene.live), scene.target.replicas)
    again = replace(scene, live=_after(scene), usable=scene.usable, resident=_held_after(scene))
    assert again.transition().empty


def _after(scene: Scene) -> tuple[LiveReplica, ...]:
    transition = scene.transition()
    kept = [replica for replica in scene.live if replica.number in transition.keep]
    first = max((replica.number for replica in scene.live), default=0) + 1
    new = [LiveReplica(first + at, one.config, one.devices) for at, one in enumerate(transition.new)]
    return (*kept, *new)


def _held_after(scene: Scene) -> dict[Device, tuple[Box, ...]]:
    needed = scene.transition().needed
    taken = {device: retained(scene.resident.get(device, ()), boxes) for device, boxes in needed.items()}
    return {**scene.resident, **taken}


def test_a_replica_whose_worker_restarted_empty_is_not_kept() -> None:
    config = ParallelConfig(1, 1, 2, 4)
    live = [LiveReplica(7, config, (A, B))]
    resident = {A: weight_boxes(SPEC, config, Position(0, 0, 0))}
    transition = plan_transition(SPEC, config, live=live, usable=[A, B], resident=resident, element_bytes=4)
    assert (transition.keep, transition.retire) == ((), (7,))
    assert [new.inherits for new in transition.new] == [(7,)]


def test_a_larger_batch_needs_a_new_replica_on_the_same_devices() -> None:
    config = ParallelConfig(1, 1, 2, 4)
    live = [LiveReplica(7, config, (B, A))]
    resident = {device: weight_boxes(SPEC, config, Position(0, 0, shard)) for shard, device in enumerate((B, A))}
    transition = plan_transition(
        SPEC, replace(config, max_batch=8), live=live, usable=[A, B], resident=resident, element_bytes=4
    )
    assert transition.retire == (7,)
    assert transition.new[0].devices == (B, A)
    assert transition.weights.moved_bytes == 0


def test_too_few_devices() -> None:
    with pytest.raises(Infeasible):
        plan_transition(SPEC, ParallelConfig(2, 1, 1, 4), live=[], usable=[A], resident={}, element_bytes=4)


def test_what_is_held_for_certain_is_held_before_and_after() -> None:
    def box(name: str, low: int, high: int) -> Box:
        return Box(name, (low,), (high,))

    before = (box("same", 0, 8), box("wider", 0, 8), box("moved", 0, 4), box("dropped", 0, 8))
    needed = (box("same", 0, 8), box("wider", 2, 4), box("moved", 2, 6), box("new", 0, 8))
    certain = common(before, needed)
    assert certain == (box("same", 0, 8), box("wider", 2, 4), box("moved", 2, 4))
    for held in (before, retained(before, needed)):
        assert all(any(one.overlap(piece) == piece for one in held) for piece in certain)
