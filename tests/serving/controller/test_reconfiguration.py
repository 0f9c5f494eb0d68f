"""The real fleet logic against peers that speak the workers' protocol, and fail where they are told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count, repeat
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from data.layout import Device
from data.models import ModelSpec
from planning.resharding import Box
from planning.sharing import plan_deployment
from planning.transition import Transition, position_boxes
from serving import messages as m
from serving.controller import targets
from tests.serving.controller.scene import Answer, Peer, opened


def inside(box: Box, held: list[Box]) -> bool:
    return any(one.overlap(box) == box for one in held)


def once(kind: type[m.Message], act: Callable[[Peer, m.Downward], None]) -> Answer:
    """Act otherwise on the first order of a kind."""
    done: list[m.Downward] = []

    def answer(peer: Peer, order: m.Downward) -> bool:
        if not isinstance(order, kind) or done:
            return False
        done.append(order)
        act(peer, order)
        return True

    return answer


def fail(peer: Peer, order: m.Downward) -> None:
    peer.worker.send(m.Failed(getattr(order, "epoch", -1), -1, "phase", "it was told to"))


@pytest.mark.parametrize("kind", [m.Prepare, m.Switch])
async def test_a_failed_phase_is_tried_again(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer, kind: type[m.Message]
) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=2) as scene:
        await scene.add("a", answer=once(kind, fail))
        await scene.add("b")
        await scene.layout("a", "b")
        assert scene.kinds().count("reconfiguration_failed") == 1
        first, *_ = scene.peers["b"].all_heard(m.Prepare)
        assert isinstance(first, m.Prepare)
        assert m.Abandon(first.epoch) in scene.peers["b"].heard
        assert not scene.fleet._stores.keys() - {scene.fleet.epoch}


async def test_after_a_failed_activation_nobody_is_asked_for_what_it_may_have_let_go(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    """Each of the two gives half of the model up when it activates; one of them did."""
    async with opened(tmp_path, spec, tokenizer, expected=1) as scene:
        await scene.add("a")
        await scene.layout("a")
        (whole,) = scene.peers["a"].all_heard(m.Prepare)
        assert isinstance(whole, m.Prepare)
        scene.peers["a"].heard.clear()
        await scene.add("b", answer=once(m.Switch, fail))
        await scene.layout("a", "b")
        first, second = scene.peers["a"].all_heard(m.Prepare)[:2]
        assert isinstance(first, m.Prepare)
        assert isinstance(second, m.Prepare)
        kept = [box for box in whole.needed if box in first.needed]  # held before and after
        assert 0 < len(kept) < len(whole.needed)
        for pieces in second.sends:
            assert all(inside(box, kept) for box in pieces.boxes)


async def test_a_loss_in_the_moment_between_two_phases_counts(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    """The last answer of a phase and the end of a worker may be read in one go."""

    async with opened(tmp_path, spec, tokenizer, expected=2) as scene:
        await scene.add("a", "b")
        await scene.layout("a", "b")
        attempts = scene.kinds().count("reconfiguration_started")

        def answer_and_go(peer: Peer, order: m.Downward) -> None:
            fleet = scene.fleet
            assert isinstance(order, m.Prepare)
            assert fleet._current is not None
            for device in fleet._current.world:
                fleet._current.heard(device, m.Prepared(order.epoch, 0, 0, 0))
            fleet.worker_lost(Device("b", 0), "in this very moment")

        scene.peers["a"].answer = once(m.Prepare, answer_and_go)
        started = asyncio.get_running_loop().time()
        assert scene.fleet.membership.notice("b", 30.0, "api")
        await scene.layout("a")
        assert asyncio.get_running_loop().time() - started < 2.0  # nobody waited for an answer that cannot come
        assert scene.kinds().count("reconfiguration_started") == attempts + 2


async def test_a_notice_voids_a_preparation_that_counts_on_the_instance(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=2) as scene:
        await scene.add("a")
        await scene.add("b", answer=lambda peer, order: isinstance(order, m.Prepare))  # never ready
        await scene.until(lambda: bool(scene.peers["b"].all_heard(m.Prepare)))
        assert scene.fleet.membership.notice("b", 30.0, "api")
        await scene.layout("a")


@pytest.mark.parametrize("change", ["notice", "loss"])
async def test_what_happens_while_a_change_is_planned_makes_the_controller_look_again(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def plan_slowly(*arguments: Any, **named: Any) -> Transition:
        began.set()
        assert go_on.wait(5.0)
        return plan_deployment(*arguments, **named)

    async with opened(tmp_path, spec, tokenizer, expected=1) as scene:
        await scene.add("a")
        await scene.layout("a")
        monkeypatch.setattr(targets, "plan_deployment", plan_slowly)
        await scene.add("b")
        await scene.until(began.is_set)
        began.clear()
        if change == "notice":
            assert scene.fleet.membership.notice("b", 30.0, "api")
        else:
            scene.peers["a"].leave()
            await scene.until(lambda: "instance_lost" in scene.kinds())
        go_on.set()
        await scene.until(began.is_set)
        if change == "notice":
            await scene.until(lambda: scene.fleet.membership.instances["b"].dismissed)
            assert scene.kinds().count("reconfiguration_started") == 1
            assert not scene.peers["b"].all_heard(m.Prepare)
        await scene.layout("a" if change == "notice" else "b")
        assert "reconfiguration_failed" not in scene.kinds()


async def test_who_has_time_is_not_in_a_hurry(tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=1) as scene:
        await scene.add("a")
        await scene.layout("a")
        await scene.add("b")
        await scene.layout("a", "b")
        assert scene.fleet.membership.notice("b", 30.0, "api")
        await scene.layout("a")
        orders = [order for order in scene.peers["a"].all_heard(m.Prepare) if isinstance(order, m.Prepare)]
        assert [order.hurry for order in orders] == [False, False, True]


@pytest.mark.parametrize("crowd", [1, 2])
async def test_the_old_layout_decodes_on_while_its_room_is_needed(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer, crowd: int
) -> None:
    """One replica of two instances runs four at once, and so does the one that is left."""
    async with opened(tmp_path, spec, tokenizer, expected=2) as scene:
        await scene.add("a", "b")
        await scene.layout("a", "b")
        for number in range(4 * crowd):
            await scene.request(f"r{number}")
        noticed = asyncio.get_running_loop().time()
        assert scene.fleet.membership.notice("b", 1.6, "api")
        await scene.layout("a")
        took_s = asyncio.get_running_loop().time() - noticed
        assert ("reconfiguration_holding" in scene.kinds()) == (crowd > 1)
        assert took_s < 0.5 if crowd == 1 else 0.5 < took_s < 1.6  # a second of the notice is left for the change


async def test_the_old_layout_decodes_on_until_the_fleet_changes_again(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=2) as scene:
        await scene.add("a", "b")
        await scene.layout("a", "b")
        for number in range(8):
            await scene.request(f"r{number}")
        assert scene.fleet.membership.notice("b", 60.0, "api")
        await scene.until(lambda: "reconfiguration_holding" in scene.kinds())
        await scene.add("c")
        await scene.layout("a", "c")


async def test_requests_that_end_let_the_change_go_on(tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=2) as scene:
        await scene.add("a", "b")
        await scene.layout("a", "b")
        records = [await scene.request(f"r{number}") for number in range(8)]
        assert scene.fleet.membership.notice("b", 60.0, "api")
        await scene.until(lambda: "reconfiguration_holding" in scene.kinds())
        for record in records[4:]:
            scene.fleet.end(record, "abort")
        await scene.layout("a")


async def test_an_advised_instance_keeps_what_it_has_and_gets_nothing_new(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=2) as scene:
        await scene.add("a", "b")
        await scene.layout("a", "b")
        epoch = scene.fleet.epoch
        scene.peers["a"].agent.send(m.Advice("a", "aws"))
        await scene.until(lambda: "advice" in scene.kinds())
        await scene.add("c", "d")
        await scene.until(lambda: scene.kinds().count("instance_joined") == 4)
        assert scene.fleet.membership.notice("b", 30.0, "api")
        await scene.layout("c", "d")  # though all that `a` has would be of use
        assert scene.fleet.epoch == epoch + 1
        assert "a" in scene.fleet.membership.instances


async def test_spares_get_ready_for_the_position_of_an_advised_instance(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=2) as scene:
        await scene.add("a", "b")
        await scene.layout("a", "b")
        assert scene.fleet.target is not None
        two = scene.fleet.target.uniform
        assert two is not None
        scene.fleet.book = replace(
            scene.fleet.book, plans=tuple(one for one in scene.fleet.book.plans if one.state.instances == 2)
        )
        await scene.add("c")
        spare, boxes = scene.peers["c"], [position_boxes(spec, two, rank) for rank in range(2)]
        await scene.until(lambda: len(spare.all_heard(m.Preload)) == 1)
        assert spare.all_heard(m.Preload) == [m.Preload(list(boxes[0]))]
        scene.fleet.fleet_changed()
        await asyncio.sleep(0.1)
        assert len(spare.all_heard(m.Preload)) == 1, "it is at it"
        spare.worker.send(m.Preloaded(list(boxes[0])))
        leaving = scene.devices()[1].instance
        scene.peers[leaving].agent.send(m.Advice(leaving, "aws"))
        await scene.until(lambda: len(spare.all_heard(m.Preload)) == 2)
        assert spare.all_heard(m.Preload)[1] == m.Preload(list(boxes[1]))
        spare.worker.send(m.Preloaded(list(boxes[1])))
        scene.peers[leaving].agent.send(m.Advice(leaving, "aws"))
        assert scene.fleet.membership.notice(leaving, 30.0, "api")
        await scene.until(lambda: "c" in {device.instance for device in scene.devices()})
        assert len(spare.all_heard(m.Preload)) == 2
        assert all(one.receives == [] for one in spare.all_heard(m.Prepare) if isinstance(one, m.Prepare))


async def test_an_advised_instance_is_used_where_others_do_not_suffice(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=1) as scene:
        await scene.add("a")
        await scene.layout("a")
        scene.peers["a"].agent.send(m.Advice("a", "aws"))
        await scene.until(lambda: "advice" in scene.kinds())
        await scene.add("b")
        await scene.layout("a", "b")


async def test_requests_of_a_paused_replica_are_replayed_when_the_switch_fails(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=1) as scene:
        await scene.add("a")
        await scene.layout("a")
        record = await scene.request()
        old = record.replica
        assert old is not None
        await scene.add("b", answer=once(m.Switch, fail))
        await scene.layout("a", "b")
        await scene.until(lambda: record.replica in scene.fleet.dispatcher.replicas)
        leader = scene.peers[scene.fleet.dispatcher.replicas[record.replica or 0].leader.instance]
        await scene.until(lambda: [one.replica for one in leader.all_heard(m.Submit)][-1:] == [record.replica])  # type: ignore[union-attr]
        assert record.recoveries == 1
        heard = scene.peers["a"].heard

        def let_go() -> list[int]:
            return [place for place, one in enumerate(heard) if isinstance(one, m.Retire) and old in one.replicas]

        await scene.until(lambda: bool(let_go()))
        surveyed = next(place for place, one in enumerate(heard) if isinstance(one, m.Survey) and old in one.ended)
        assert min(let_go()) > surveyed, "its cache was there to go on from"


async def test_what_moves_is_counted(tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=1) as scene:
        await scene.add("a")
        await scene.layout("a")
        await scene.add("b")
        await scene.layout("a", "b")
        moved = scene.fleet._metrics.registry.get_sample_value("perennial_moved_bytes_total", {"what": "weights"})
        assert moved is not None
        assert moved > 0


async def test_a_request_may_end_while_its_cache_moves(tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=1) as scene:
        await scene.add("a")
        await scene.layout("a")
        gone, stays = await scene.request("gone"), await scene.request("stays")
        residents = [m.Resident(gone.key, 3, [0]), m.Resident(stays.key, 3, [1])]

        def paused(peer: Peer, order: m.Downward) -> None:
            assert isinstance(order, m.Pause)
            peer.worker.send(m.Paused(order.replica, residents))

        def moving(peer: Peer, order: m.Downward) -> bool:
            if isinstance(order, m.Switch):
                scene.fleet.end(gone, "abort")
            return False

        scene.peers["a"].answer = once(m.Pause, paused)
        await scene.add("b", answer=moving)
        await scene.layout("a", "b")
        assert "reconfiguration_failed" not in scene.kinds()
        (replica,) = scene.fleet.dispatcher.replicas.values()
        assert list(replica.records) == [stays.key]
        leader = scene.peers[replica.leader.instance]
        activate = leader.all_heard(m.Switch)[-1]
        assert isinstance(activate, m.Switch)
        assert [one.assignment.key for one in activate.adoptions] == [gone.key, stays.key]
        await scene.until(lambda: m.Cancel(replica.number, [gone.key]) in leader.heard)


async def test_a_leader_that_never_pauses_costs_the_timeout(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=1, pause_s=0.2) as scene:
        await scene.add("a", answer=once(m.Pause, lambda peer, order: None))
        await scene.layout("a")
        record = await scene.request()
        await scene.add("b")
        await scene.layout("a", "b")
        assert scene.kinds().count("reconfiguration_failed") == 1
        assert record.replica in scene.fleet.dispatcher.replicas


async def test_words_of_old_replicas_and_epochs_are_void(tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=1) as scene:
        await scene.add("a")
        await scene.layout("a")
        record = await scene.request()
        old = record.replica
        assert old is not None
        await scene.add("b")
        await scene.layout("a", "b")
        peer = scene.peers["a"]
        peer.worker.send(m.Tokens(old, [m.Emission(record.key, 0, 9)], 1, 0, 0.0))
        peer.worker.send(m.Failed(scene.fleet.epoch - 1, old, "step", "late"))
        peer.worker.send(m.Switched(scene.fleet.epoch - 1, 0))
        new = record.replica
        assert new is not None
        peer.worker.send(m.Tokens(new, [m.Emission(record.key, 0, 5), m.Emission(999, 0, 5)], 1, 0, 0.0))
        await scene.until(lambda: record.committed == 1)
        assert record.output == [5]
        assert record.replica == new
        assert record.replayed == 0
        peer.worker.send(m.Tokens(new, [], 1, 0, 0.0, [record.key, 999]))
        await scene.until(lambda: record.replayed == 1)


async def test_a_token_out_of_turn_breaks_the_replica_and_loses_nothing(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    async with opened(tmp_path, spec, tokenizer, expected=1) as scene:
        await scene.add("a")
        await scene.layout("a")
        record = await scene.request()
        old = record.replica
        assert old is not None
        scene.peers["a"].worker.send(m.Tokens(old, [m.Emission(record.key, 3, 9)], 1, 0, 0.0))
        await scene.until(lambda: record.replica not in (None, old))
        assert record.output == []
        assert "replica_failed" in scene.kinds()


async def test_epochs_and_replica_numbers_go_on_after_a_restart(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer
) -> None:
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        async with opened(tmp_path, spec, tokenizer, expected=1) as scene:
            await scene.add("a")
            await scene.layout("a")
            (replica,) = scene.fleet.dispatcher.replicas.values()
            seen.append((replica.epoch, replica.number))
    assert seen[1][0] > seen[0][0]
    assert seen[1][1] > seen[0][1]


@pytest.mark.parametrize(("given_up", "first_sent"), [(False, 6), (True, 0)])
async def test_what_a_copy_beside_holds_does_not_travel_unless_it_was_given_up_meanwhile(
    tmp_path: Path, spec: ModelSpec, tokenizer: Tokenizer, given_up: bool, first_sent: int
) -> None:
    """One instance runs a request, another keeps its copy and becomes the second stage."""
    tables = count(1) if given_up else repeat(1)

    async with opened(tmp_path, spec, tokenizer, expected=1) as scene:
        record = None

        def resident(peer: Peer, order: m.Downward) -> bool:
            running = [m.Resident(record.key, 9, [0])] if record else []
            if isinstance(order, m.Snapshot):
                peer.worker.send(m.Residents(order.epoch, order.replica, running))
            elif isinstance(order, m.Pause):
                peer.worker.send(m.Paused(order.replica, running))
            return isinstance(order, m.Snapshot | m.Pause)

        def keeping(peer: Peer, order: m.Downward) -> bool:
            if not isinstance(order, m.Survey):
                return False
            assert record is not None
            whole = (0, spec.layers), (0, spec.kv_heads)
            kept = m.Holding(order.replicas[0], record.key, 6, *whole, True, [4], next(tables))
            peer.worker.send(m.Holdings(order.epoch, [kept]))
            return True

        await scene.add("a", answer=resident)
        await scene.layout("a")
        record = await scene.request()
        await scene.add("b", answer=keeping)
        await scene.layout("a", "b")
        read = [one for one in _sent(scene.peers["b"]) if one.kept]
        assert [(one.peer, span.start, span.stop) for one in read for span in one.spans] == [("b/0", 0, 6)]
        sent = [span for one in _sent(scene.peers["a"]) if one.peer == "b/0" for span in one.spans]
        assert [(span.start, span.stop) for span in sent] == [(first_sent, 9)]


def _sent(peer: Peer) -> list[m.KvPieces]:
    orders = [order for order in peer.heard if isinstance(order, m.Copy | m.Switch)]
    return [piece for order in orders for piece in order.sends]
