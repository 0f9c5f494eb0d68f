"""Seats that a leader keeps for requests that are to join, and what it says of those it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from serving import messages as m
from serving.engine.batch import SampledToken, StepPlan
from serving.engine.kv_index import KvIndex
from serving.engine.scheduler import ScheduledRequest, Scheduler, SchedulerLimits
from serving.requests import Limits, Sampling
from serving.worker.leader import Leader
from serving.worker.position import Position
from serving.worker.tables import Known

REPLICA = 6


class Scene:
    """A leader that is not started: its commands are carried out by the test."""

    def __init__(self, *, blocks: int = 12, ranks: int = 1) -> None:
        self.scheduler = Scheduler(SchedulerLimits(4, 4, 4, blocks, 100), [])
        self.index, self.told, self.sent = KvIndex(), list[m.Message](), list[bytes]()
        group = SimpleNamespace(check=lambda: None, send_bytes=self._send)
        part = SimpleNamespace(index=self.index)
        position = SimpleNamespace(
            number=REPLICA,
            replicas=[REPLICA],
            group=group,
            role=SimpleNamespace(members=list(range(ranks)), stages=1),
            part=lambda number: part if number == REPLICA else None,
        )
        self.leader = Leader(
            cast(Position, position), [self.scheduler], fail=pytest.fail, report=self.told.append, keepalive_s=0.05
        )

    def _send(self, payload: bytes, rank: int) -> object:
        self.sent.append(payload)
        return SimpleNamespace(wait=lambda: None)

    def obey(self) -> None:
        self.leader._obey()

    def reserve(self, epoch: int, key: int, tokens: int) -> list[int]:
        self.leader.reserve(epoch, [m.Wanted(key, REPLICA, tokens)])
        self.obey()
        answer = self.told.pop()
        assert isinstance(answer, m.Reserved)
        return next((seat.blocks for seat in answer.seats if seat.key == key), [])

    def graft(self, epoch: int, *adoptions: m.Adoption) -> None:
        self.leader.graft(epoch, list(adoptions))
        self.obey()

    def step(self, sampled: Sequence[int] = ()) -> StepPlan:
        plan = self.scheduler.schedule(0.0)
        assert plan is not None
        drawn = [SampledToken(key, 1, 0.0, []) for key in sampled]
        self.leader._in_flight.append((plan, drawn))
        self.leader._collect()
        return plan

    def resident(self) -> dict[int, int]:
        self.leader.snapshot(1)
        self.obey()
        answer = self.told.pop()
        assert isinstance(answer, m.Residents)
        return {one.key: one.cached_tokens for one in answer.sequences}


def adoption(key: int, tokens: int, blocks: list[int]) -> m.Adoption:
    assignment = m.Assignment(key, [1] * (tokens + 1), [], Sampling(), Limits(max_tokens=5), None)
    return m.Adoption(REPLICA, assignment, tokens, blocks)


def test_a_seat_grows_and_keeps_what_is_in_it() -> None:
    scene = Scene()
    first = scene.reserve(1, 10, 8)
    assert len(first) == 2
    more = scene.reserve(1, 10, 14)
    assert more[:2] == first
    assert len(more) == 4
    scene.graft(1, adoption(10, 13, more))
    assert scene.scheduler.snapshot() == [(10, 13, more, 0)]


def test_seats_of_an_attempt_that_failed_are_free_later_unless_the_next_one_has_taken_them() -> None:
    """Other ranks may still be writing there: the same request's KV, which is what the next attempt writes."""
    scene = Scene()
    first = scene.reserve(1, 10, 8)
    scene.reserve(1, 11, 8)
    assert scene.reserve(2, 10, 8) == first
    scene.graft(1)  # the late end of the first attempt
    assert scene.scheduler.kv_usage == pytest.approx(2 / 12)
    scene.graft(2, adoption(10, 7, first))
    scene.graft(2)
    assert scene.scheduler.snapshot() == [(10, 7, first, 0)]


def test_ranks_are_told_of_kv_that_came_for_nobody() -> None:
    """Its blocks go to others, and a failure must not find it under its old key."""
    scene = Scene()
    for key in (10, 11):
        scene.index.adopt(key, 7, scene.reserve(1, key, 8))
    scene.graft(1, adoption(10, 7, [0, 1]))
    plan = scene.step([10])
    assert plan.ended == [11]
    scene.index.begin(plan)
    assert set(scene.index.snapshot()) == {10}


def test_ranks_hear_the_whole_table_of_who_comes_again() -> None:
    """Before any plan could say that the one they know has ended."""
    scene, ranks = Scene(ranks=2), Known()
    first = scene.reserve(1, 10, 8)
    scene.graft(1, adoption(10, 7, first))
    ranks.decode(scene.leader._tables.encode(scene.step([10])))
    scene.leader.cancel(REPLICA, [10])
    scene.obey()
    taken = {key: scene.reserve(2, key, 8) for key in (11, 10)}
    assert taken[10] != first
    scene.graft(2, *(adoption(key, 7, blocks) for key, blocks in taken.items()))
    plan = scene.step([10, 11])
    assert plan.ended == []
    assert ranks.decode(scene.leader._tables.encode(plan)) == plan


def test_a_new_role_begins_with_those_it_adopts_and_no_others() -> None:
    scene = Scene()
    scene.index.adopt(10, 7, [0, 1])
    scene.index.adopt(11, 7, [1, 2])  # it ended on its way, and another one has got a part of its seat
    scene.leader.adopt([adoption(10, 7, [0, 1])])
    assert scene.step([10]).ended == [11]


def test_chunks_of_a_prompt_count_once_a_token_shows_that_every_rank_has_computed_them() -> None:
    scene = Scene()
    scene.scheduler.add(ScheduledRequest(10, [1] * 9, sampling=Sampling()))
    scene.step()
    assert scene.resident() == {}
    assert scene.leader._residents()[0].cached_tokens == 4
    scene.step()
    assert scene.resident() == {}
    scene.step([10])
    assert scene.resident() == {10: 9}


def test_ranks_hear_of_a_leader_that_waits_for_the_journal() -> None:
    scene = Scene(ranks=2)
    while scene.leader._window.acquire(blocking=False):
        pass
    stopped = time.monotonic() + 1.3
    scene.leader._stopped = cast(Any, SimpleNamespace(is_set=lambda: time.monotonic() > stopped))
    assert not scene.leader._granted()
    assert len(scene.sent) >= 2
