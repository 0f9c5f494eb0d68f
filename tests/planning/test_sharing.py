"""Changes between deployments of two models: small enough to be looked at from every side."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.deployment import Deployment, Hosted, SharedGroup
from data.errors import Infeasible
from data.layout import Device, ParallelConfig
from planning.resharding import subtract
from planning.sharing import group_boxes, live_groups, plan_deployment
from planning.transition import LiveReplica, Transition
from tests.planning.fleets import SPEC, Scene, scenes

SPECS = {"a": replace(SPEC, name="a"), "b": replace(SPEC, name="b", layers=3, ffn=24)}
A, B, BOTH = (Hosted("a", 4),), (Hosted("b", 4),), (Hosted("a", 4, 0.5), Hosted("b", 2, 0.5))
DEVICES = tuple(Device(name, index) for name in "wxyz" for index in range(2))
GROUPS = [SharedGroup(*shape, hosted) for shape in ((1, 1), (1, 2), (2, 1)) for hosted in (A, B, BOTH)]


@dataclass(frozen=True)
class Change:
    """From groups on the first devices to others on those that are usable."""

    live: tuple[LiveReplica, ...]
    usable: tuple[Device, ...]
    target: Deployment

    def transition(self) -> Transition:
        resident = {
            device: group_boxes(SPECS, one.group, rank)
            for one in live_groups(self.live)
            for rank, device in enumerate(one.devices)
        }
        return plan_deployment(
            SPECS, self.target, live=self.live, usable=self.usable, resident=resident, element_bytes=4
        )


def deployments(devices: int) -> st.SearchStrategy[Deployment]:
    groups = st.lists(st.sampled_from(GROUPS), min_size=1, max_size=4)
    return groups.map(tuple).map(Deployment).filter(lambda one: one.devices <= devices)


def living(deployment: Deployment, tokens: tuple[int, ...] = ()) -> tuple[LiveReplica, ...]:
    found: list[LiveReplica] = []
    free = list(DEVICES)
    for group in deployment.groups:
        devices, free = tuple(free[: group.devices]), free[group.devices :]
        for hosted in group.hosted:
            number = len(found)
            cached = tokens[number % len(tokens)] if tokens else 0
            found.append(LiveReplica(number, group.config(hosted), devices, cached, hosted.model, hosted.kv_share))
    return tuple(found)


@st.composite
def changes(draw: st.DrawFn) -> Change:
    tokens = draw(st.lists(st.integers(0, 500), min_size=1, max_size=4).map(tuple))
    live = living(draw(deployments(len(DEVICES))), tokens)
    gone = draw(st.sets(st.sampled_from("wxyz"), max_size=2))
    usable = tuple(device for device in DEVICES if device.instance not in gone)
    return Change(live, usable, draw(deployments(len(usable))))


@settings(deadline=None)
@given(change=changes())
def test_what_is_kept_and_what_is_new_are_the_target(change: Change) -> None:
    transition = change.transition()
    assert sorted((*transition.keep, *transition.retire)) == [one.number for one in change.live]
    kept = live_groups([one for one in change.live if one.number in transition.keep])
    new = live_groups([
        LiveReplica(100 + index, one.config, one.devices, 0, one.model, one.kv_share)
        for index, one in enumerate(transition.new)
    ])  # fmt: skip
    assert Counter(one.group for one in (*kept, *new)) == change.target.counts
    devices = [device for one in (*kept, *new) for device in one.devices]
    assert len(devices) == len(set(devices)) == change.target.devices
    assert set(devices) <= set(change.usable)


@settings(deadline=None)
@given(change=changes())
def test_a_group_that_is_wanted_as_it_is_stays(change: Change) -> None:
    transition = change.transition()
    whole = [one for one in live_groups(change.live) if set(one.devices) <= set(change.usable)]
    wanted = change.target.counts & Counter(one.group for one in whole)
    kept = Counter(one.group for one in whole if one.replicas[0].number in transition.keep)
    assert kept == wanted


@settings(deadline=None)
@given(change=changes())
def test_requests_go_on_in_a_new_replica_of_their_own_model(change: Change) -> None:
    transition = change.transition()
    models = {one.number: one.model for one in change.live}
    heirs = [number for one in transition.new for number in one.inherits]
    assert all(models[number] == one.model for one in transition.new for number in one.inherits)
    assert len(heirs) == len(set(heirs))
    built = {one.model for one in transition.new}
    assert set(heirs) == {number for number in transition.retire if models[number] in built}


@settings(deadline=None)
@given(change=changes())
def test_every_box_of_every_model_comes_from_a_holder_or_from_disk_exactly_once(change: Change) -> None:
    transition = change.transition()
    held = {
        device: group_boxes(SPECS, one.group, rank)
        for one in live_groups(change.live)
        for rank, device in enumerate(one.devices)
    }
    arriving: dict[Device, list] = {device: [] for device in transition.needed}
    weights = transition.weights
    for transfer in (*weights.local, *weights.transfers, *weights.relays):
        arriving[transfer.destination] += transfer.boxes
    for transfer in (*weights.local, *weights.transfers):
        if transfer.source is not None:
            for box in transfer.boxes:
                assert any(one.overlap(box) == box for one in held[transfer.source])
    for transfer in weights.relays:
        assert set(transfer.boxes) <= set(arriving[transfer.source])
    for device, boxes in transition.needed.items():
        assert sum(box.elements for box in boxes) == sum(box.elements for box in arriving[device])
        for box in boxes:
            left = [box]
            for piece in arriving[device]:
                left = [rest for part in left for rest in subtract(part, piece)]
            assert not left


def test_devices_stay_with_the_models_that_they_hold() -> None:
    live = living(Deployment((SharedGroup(1, 1, A), SharedGroup(1, 1, B))))
    target = Deployment((SharedGroup(1, 1, (Hosted("a", 8),)), SharedGroup(1, 1, (Hosted("b", 8),))))
    transition = Change(live, DEVICES[:2], target).transition()
    assert [(one.model, one.devices) for one in transition.new] == [(one.model, one.devices) for one in live]
    assert transition.weights.moved_bytes == 0


def test_a_sharded_group_keeps_to_one_instance() -> None:
    live = living(Deployment((SharedGroup(1, 1, B),)))
    target = Deployment((SharedGroup(1, 2, A), SharedGroup(1, 1, (Hosted("b", 8),))))
    transition = Change(live, DEVICES[:4], target).transition()
    places = {one.model: one.devices for one in transition.new}
    assert places["b"] == DEVICES[:1]
    assert {device.instance for device in places["a"]} == {"x"}


def test_too_few_devices_are_said() -> None:
    with pytest.raises(Infeasible, match=r"P1·T2\(a·B4\) need more devices than the 1 that are free"):
        Change((), DEVICES[:1], Deployment((SharedGroup(1, 2, A),))).transition()


@settings(deadline=None, max_examples=30)
@given(scene=scenes())
def test_a_fleet_of_one_model_changes_as_it_always_did(scene: Scene) -> None:
    transition = plan_deployment(
        {"": SPEC},
        Deployment.of(scene.target),
        live=scene.live,
        usable=scene.usable,
        resident=scene.resident,
        element_bytes=SPEC.dtype_bytes,
    )
    assert transition == scene.transition()


def test_a_device_with_the_whole_of_its_models_needs_nothing_for_another_shape() -> None:
    group = SharedGroup(2, 1, BOTH)
    whole = group_boxes(SPECS, group, 0, whole=True)
    assert {box.tensor.partition("/")[0] for box in whole} == {"a", "b"}
    config = ParallelConfig(1, 1, 1, 1)
    assert whole == group_boxes(SPECS, SharedGroup(config.stages, config.shards, BOTH), 0)
