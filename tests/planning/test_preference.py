from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.deployment import Deployment
from data.layout import Device, ParallelConfig
from planning.preference import dependable, spare_ranks
from planning.transition import LiveReplica
from tests.planning.fleets import Scene, scenes

PAIR = ParallelConfig(1, 2, 1, 4)


def devices(*names: str) -> tuple[Device, ...]:
    return tuple(Device(name, index) for name in names for index in range(2))


@pytest.mark.parametrize(
    ("advised", "target", "chosen"),
    [
        ((), PAIR, "abc"),
        (("a",), PAIR, "bc"),
        (("a", "b"), PAIR, "c"),
        (("a", "b", "c"), PAIR, "a"),  # as few advised instances as will do
        (("b", "c"), replace(PAIR, replicas=2), "ab"),
        (("a", "b"), replace(PAIR, replicas=3), "abc"),
    ],
)
def test_advised_instances_come_last(advised: tuple[str, ...], target: ParallelConfig, chosen: str) -> None:
    assert dependable(devices(*"abc"), devices(*advised), live=(), target=Deployment.of(target)) == devices(*chosen)


@pytest.mark.parametrize(
    ("config", "usable", "chosen"),
    [
        (PAIR, "abc", "abc"),  # what runs on `a` stays
        (replace(PAIR, max_batch=8), "abc", "bc"),  # it would have to be built anew
        (replace(PAIR, stages=1, shards=2), "abc", "bc"),
    ],
)
def test_a_replica_of_the_wanted_shape_stays(config: ParallelConfig, usable: str, chosen: str) -> None:
    live = [LiveReplica(1, config, devices("a"))]
    assert dependable(devices(*usable), devices("a"), live=live, target=Deployment.of(PAIR)) == devices(*chosen)


def test_a_broken_replica_holds_nothing_back() -> None:
    live = [LiveReplica(1, PAIR, (Device("a", 0), Device("gone", 0)))]
    assert dependable(devices("a", "b"), devices("a"), live=live, target=Deployment.of(PAIR)) == devices("b")


@settings(deadline=None)
@given(scene=scenes(), data=st.data())
def test_an_advice_makes_no_plan_impossible_and_ends_no_replica(scene: Scene, data: st.DataObject) -> None:
    names = sorted({device.instance for device in scene.usable})
    risky = data.draw(st.sets(st.sampled_from(names)))
    advised = {device for device in scene.usable if device.instance in risky}
    chosen = dependable(scene.usable, advised, live=scene.live, target=Deployment.of(scene.target))
    assert set(chosen) <= set(scene.usable)
    narrowed = replace(scene, usable=chosen).transition()
    assert set(scene.transition().keep) <= set(narrowed.keep)


@given(st.integers(0, 9), st.integers(1, 6), st.lists(st.integers(0, 5), max_size=6))
def test_spares_get_ready_for_whoever_may_go_and_then_for_all_alike(
    spares: int, ranks: int, advised: list[int]
) -> None:
    advised = [rank for rank in advised if rank < ranks]
    chosen = spare_ranks(spares, ranks, advised)
    first = list(dict.fromkeys(advised))[:spares]
    assert list(chosen[: len(first)]) == first
    counts = [chosen[len(first) :].count(rank) for rank in range(ranks)]
    assert len(chosen) == spares
    assert max(counts) - min(counts) <= 1
