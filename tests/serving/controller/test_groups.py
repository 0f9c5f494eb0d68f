"""Replicas that share devices, as the fleet treats them: prepared, paused, broken and kept together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data.cluster import ClusterSpec, ClusterState, InstanceType
from data.deployment import Deployment, Hosted, SharedGroup
from data.layout import Device
from data.models import ModelSpec
from data.shared_plan import SharedPlan, SharedPlanBook
from planning.sharing import group_boxes
from serving import messages as m
from tests.serving.controller.scene import Peer, Scene, opened

PAIR = SharedGroup(1, 1, (Hosted("a", 4, 0.75), Hosted("b", 4, 0.25)))
ALONE = SharedGroup(1, 1, (Hosted("b", 8),))


def book(spec: ModelSpec, *plans: tuple[SharedGroup, ...]) -> SharedPlanBook:
    """Groups for one instance, for two, and so on."""
    kind = InstanceType("local-cpu", 1, "cpu", 1 << 30, 1e9, 1e9, 1.0, 0.3, 5.0)
    models = replace(spec, name="a"), replace(spec, name="b", layers=1)
    states = [ClusterState.of({"local-cpu": count}) for count in range(1, len(plans) + 1)]
    chosen = [SharedPlan(state, Deployment(groups), "test") for state, groups in zip(states, plans, strict=True)]
    return SharedPlanBook(models, ClusterSpec("local", (kind,), (len(plans),)), "test", tuple(chosen))


@pytest.fixture
async def scene(tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer) -> AsyncIterator[Scene]:
    plans = (PAIR,), (PAIR, ALONE)
    async with opened(tmp_path, spec, tokenizer, expected=1, book=book(spec, *plans)) as scene:
        await scene.add("x")
        await scene.layout("x")
        yield scene


def role(order: m.Downward) -> m.Role:
    assert isinstance(order, m.Prepare)
    assert order.role is not None
    return order.role


async def test_a_group_is_prepared_in_one_order_with_a_budget_for_each_model(scene: Scene) -> None:
    (order,) = scene.peers["x"].all_heard(m.Prepare)
    first, second = role(order).hosted
    assert (first.model, second.model) == ("a", "b")
    numbers = {one.number: one.model for one in scene.fleet.dispatcher.replicas.values()}
    assert numbers == {first.replica: "a", second.replica: "b"}
    assert isinstance(order, m.Prepare)
    assert {box.tensor.partition("/")[0] for box in order.needed} == {"a", "b"}


async def test_a_broken_step_ends_all_replicas_of_the_group(scene: Scene) -> None:
    records = [await scene.request(model, model) for model in "ab"]
    numbers = {record.replica for record in records}
    assert numbers == set(scene.fleet.dispatcher.replicas)
    failed = next(iter(scene.fleet.dispatcher.replicas))
    scene.peers["x"].worker.send(m.Failed(scene.fleet.epoch, failed, "step", "told to"))
    await scene.until(lambda: len(set(scene.fleet.dispatcher.replicas) - numbers) == 2)
    assert {one.replica for one in scene.peers["x"].all_heard(m.Salvage) if isinstance(one, m.Salvage)} == numbers
    await scene.until(lambda: {record.replica for record in records} == set(scene.fleet.dispatcher.replicas))
    assert scene.kinds().count("replica_failed") == 2


async def test_a_group_that_the_next_plan_wants_goes_on_undisturbed(scene: Scene) -> None:
    before = set(scene.fleet.dispatcher.replicas)
    scene.peers["x"].heard.clear()
    await scene.add("y")
    await scene.until(lambda: Device("y", 0) in scene.devices())
    assert before < set(scene.fleet.dispatcher.replicas)
    assert not scene.peers["x"].all_heard(m.Pause)
    hosted = role(scene.peers["y"].all_heard(m.Prepare)[0]).hosted
    assert [(one.model, one.max_batch) for one in hosted] == [("b", 8)]


async def test_a_leaving_group_pauses_once_and_its_requests_go_on_by_model(scene: Scene) -> None:
    records = [await scene.request(model, model) for model in "ab"]

    def residents(peer: Peer, order: m.Downward) -> bool:
        sequences = [m.Resident(record.key, 3, [0]) for record in records]
        if isinstance(order, m.Snapshot):
            peer.worker.send(m.Residents(order.epoch, order.replica, sequences))
        elif isinstance(order, m.Pause):
            peer.worker.send(m.Paused(order.replica, sequences))
        return isinstance(order, m.Snapshot | m.Pause)

    scene.peers["x"].answer = residents
    await scene.add("y")
    await scene.until(lambda: Device("y", 0) in scene.devices())
    assert scene.fleet.membership.notice("x", 30.0, "api")
    await scene.layout("y")
    assert len(scene.peers["x"].all_heard(m.Pause)) == 1
    switch = scene.peers["y"].all_heard(m.Switch)[-1]
    assert isinstance(switch, m.Switch)
    models = {number: one.model for number, one in scene.fleet.dispatcher.replicas.items()}
    assert {models[one.replica]: one.assignment.key for one in switch.adoptions} == {
        record.model: record.key for record in records
    }
    assert {record.model for record in records if record.replica in models} == {"a", "b"}


async def test_spares_get_ready_for_the_groups_of_the_plan(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    plans = book(spec, (PAIR,))
    async with opened(tmp_path, spec, tokenizer, expected=1, book=plans) as scene:
        await scene.add("x")
        await scene.layout("x")
        await scene.add("y")
        await scene.until(lambda: bool(scene.peers["y"].all_heard(m.Preload)))
        specs = {one.name: one for one in plans.models}
        assert scene.peers["y"].all_heard(m.Preload) == [m.Preload(list(group_boxes(specs, PAIR, 0)))]
