"""Streams of KV to a real keeper, over real sockets."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from serving.engine.batch import SequenceStep, StepPlan
from serving.engine.kv_cache import KvCache
from serving.engine.kv_index import Cached, Kept, KvIndex, Tempo
from serving.errors import TransportError
from serving.requests import Sampling
from serving.worker import kv_wire as wire
from serving.worker.checksum import as_bytes, checksum
from serving.worker.keeper import Keeper, KvLog
from serving.worker.kv_stream import KvStream, next_spans
from tests.serving.engine.cells import extract

BLOCKS, BLOCK_TOKENS = 12, 4


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    keeper = Keeper("127.0.0.1", "secret")
    yield keeper
    keeper.close()


def cache() -> KvCache:
    made = KvCache((2, 4), (1, 3), 8, BLOCKS, BLOCK_TOKENS, torch.float32, "cpu")
    source = torch.Generator().manual_seed(7)
    slots = torch.arange(BLOCKS * BLOCK_TOKENS)
    made.scatter(slots, (2, 4), (1, 3), torch.randn(2, 2, len(slots), 2, 8, generator=source))
    return made


def plan(step: int, *sequences: tuple[int, int, int, list[int]], ended: tuple[int, ...] = ()) -> StepPlan:
    steps = [SequenceStep(key, start, [1] * count, blocks, Sampling(), 0) for key, start, count, blocks in sequences]
    return StepPlan(step, steps, list(ended))


def grow(index: KvIndex, step: int, *sequences: tuple[int, int, int, list[int]]) -> StepPlan:
    """What the step loop does: begin a step, compute it, and build on it."""
    made = plan(step, *sequences)
    index.begin(made)
    index.finish(made)
    return made


class Passed:
    """A mark that the device has been through, or will have when it is told so."""

    def __init__(self, passed: bool = True) -> None:
        self.passed = passed

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True


def held_up_s(stream: KvStream, step: StepPlan, *, lag: int) -> float:
    began = time.monotonic()
    stream.hold(step, lag)
    return time.monotonic() - began


async def until(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - other threads have no events for this loop
            await asyncio.sleep(0.005)


def kept(keeper: Keeper) -> dict[int, int]:
    return {one.key: one.tokens for one in keeper.holdings([5])}


async def test_a_copy_follows_the_cache_and_forgets_who_ended(keeper: Keeper) -> None:
    source, index = cache(), KvIndex()
    stream = KvStream(keeper.address, "secret", 5, source, index, frame_bytes=400)
    stream.start()
    index.adopt(1, 9, [3, 7, 1])
    await until(lambda: kept(keeper) == {1: 9})
    index.begin(plan(1, (1, 9, 1, [3, 7, 1]), (2, 0, 6, [0, 2])))
    index.finish(plan(1, (1, 9, 1, [3, 7, 1]), (2, 0, 6, [0, 2])))
    await until(lambda: kept(keeper) == {1: 10, 2: 6})
    index.begin(plan(2, (1, 10, 1, [3, 7, 1]), (2, 6, 1, [0, 2])))
    index.finish(plan(2, (1, 10, 1, [3, 7, 1]), (2, 6, 1, [0, 2])))
    await until(lambda: kept(keeper) == {1: 11, 2: 7})
    for one in keeper.holdings([5]):
        copy = keeper.cache(5, (3, 4), (2, 3))
        table = {1: [3, 7, 1], 2: [0, 2]}[one.key]
        found = extract(copy, one.blocks, one.tokens, (2, 4), (1, 3))
        assert torch.equal(found, extract(source, table, one.tokens, (2, 4), (1, 3)))
    index.begin(plan(3, (2, 7, 1, [0, 2]), ended=(1,)))
    await until(lambda: kept(keeper) == {2: 7})
    stream.stop()
    keeper.drop_others([])
    assert not keeper.holdings([5])


async def test_a_step_waits_for_its_copy_but_not_for_a_keeper_that_is_gone(keeper: Keeper) -> None:
    index, told = KvIndex(), list[bool]()
    stream = KvStream(keeper.address, "secret", 5, cache(), index, frame_bytes=1 << 20, tell=told.append)
    stream.start()
    await until(lambda: told == [True])
    grow(index, 1, (1, 0, 9, [3, 7, 1]))
    step = grow(index, 2, (1, 9, 1, [3, 7, 1]))
    stream.hold(step, 0)
    assert kept(keeper) in ({1: 9}, {1: 10})  # 9 tokens had to be there
    stream.stop()
    assert held_up_s(stream, step, lag=-30) < 0.2


async def test_nobody_waits_for_copies_of_what_was_there_before_they_began(keeper: Keeper) -> None:
    index, told = KvIndex(), list[bool]()
    index.adopt(1, 9, [3, 7, 1])
    stream = KvStream(keeper.address, "secret", 5, cache(), index, frame_bytes=1 << 20, tell=told.append)
    step = grow(index, 1, (1, 9, 1, [3, 7, 1]))
    assert held_up_s(stream, step, lag=0) < 0.2
    stream.start()
    await until(lambda: told[-1:] == [True])
    assert kept(keeper)[1] >= 9
    index.adopt(2, 4, [0])
    await until(lambda: told[-1] and kept(keeper) == {1: 10, 2: 4})
    assert told in ([False, True, False, True], [False, True, True])
    stream.stop()


async def test_a_keeper_that_hangs_holds_one_step_up(keeper: Keeper) -> None:
    index, told = KvIndex(), list[bool]()
    stream = KvStream(keeper.address, "secret", 5, cache(), index, frame_bytes=1 << 20, tell=told.append)
    stream.start()
    await until(lambda: told == [True])
    step = grow(index, 1, (1, 0, 1, [3, 7, 1]))
    later = grow(index, 2, (1, 1, 1, [3, 7, 1]))
    assert held_up_s(stream, later, lag=-30) > 0.4  # as long as a keeper would that never answers
    assert held_up_s(stream, step, lag=-30) < 0.2
    grow(index, 3, (1, 2, 1, [3, 7, 1]))
    await until(lambda: told == [True, False, True])
    stream.stop()


def test_who_does_not_know_the_token_is_told_so(keeper: Keeper) -> None:
    host, _, port = keeper.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5.0) as connection:
        wire.send(connection, wire.Greeting("wrong", 5, (0, 1), (0, 1), 8, 4, 4, "float32"))
        answer, _ = wire.receive(connection, wire.Answer, most_bytes=0)
    assert answer.refusal == "wrong join token"
    assert not keeper.holdings([5])


def test_a_table_that_begins_anew_has_another_number() -> None:
    """Whoever read the old one can tell."""
    log = KvLog(wire.Greeting("", 5, (0, 1), (0, 1), 2, 2, 4, "float32"))

    def append(number: int, start: int, stop: int) -> dict[int, int]:
        body = torch.zeros(4 * (stop - start)).view(torch.uint8)
        log.append(wire.Frame(number, [(1, start, stop)], [], checksum(body)), body)
        return {one.key: one.table for one in log.holdings()}

    first = append(1, 0, 3)
    assert append(2, 3, 5) == first
    assert append(3, 0, 2)[1] != first[1]


def test_damage_and_gaps_are_refused() -> None:
    log = KvLog(wire.Greeting("", 5, (0, 1), (0, 1), 2, 2, 4, "float32"))
    body = torch.arange(2 * 3 * 2, dtype=torch.float32).view(torch.uint8)
    log.append(wire.Frame(1, [(1, 0, 3)], [], checksum(body)), body)
    for frame in (
        wire.Frame(2, [(1, 3, 6)], [], checksum(body) ^ 1),
        wire.Frame(2, [(1, 4, 7)], [], checksum(body)),
        wire.Frame(2, [(2, 1, 4)], [], checksum(body)),
    ):
        with pytest.raises(TransportError):
            log.append(frame, body)
    assert [(one.key, one.tokens) for one in log.holdings()] == [(1, 3)]


def test_a_log_has_memory_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block once, in order, and for each sequence one more than it fills."""
    monkeypatch.setattr("serving.worker.keeper._AHEAD", 2)
    monkeypatch.setattr("serving.worker.keeper._TAKEN_BYTES", 1)  # one block at a time
    log = KvLog(wire.Greeting("", 1, (0, 1), (0, 1), 4, BLOCKS, BLOCK_TOKENS, "float32"))
    taken: list[int] = []
    take = log.cache.populate

    def populate(first: int, most_bytes: int) -> int:
        count = take(first, most_bytes)
        taken.extend(range(first, first + count))
        return count

    monkeypatch.setattr(log.cache, "populate", populate)
    assert log.short
    log.populate()
    assert taken == [0, 1]
    body = torch.ones(5 * 8, dtype=torch.float32).view(torch.uint8)
    log.append(wire.Frame(1, [(9, 0, 5)], [], checksum(body)), body)  # two blocks of one sequence
    log.populate()
    assert taken == list(range(2 + 1 + 2))
    assert not log.short
    assert torch.equal(log.cache.gather(torch.arange(5), (0, 1), (0, 1)), torch.ones(1, 2, 5, 1, 4)), (
        "it is still there"
    )
    log.append(wire.Frame(2, [(8, 0, 5)], [], checksum(body)), body)
    log.close()
    log.populate()  # nobody will need it
    assert max(taken) == 4


def test_short_tails_go_first_and_a_new_life_starts_over() -> None:
    cached = {1: Cached(100, (), 1), 2: Cached(8, (), 2), 3: Cached(5, (), 9)}
    sent = {1: Cached(40, (), 1), 2: Cached(7, (), 2), 3: Cached(5, (), 3)}
    spans = next_spans(cached, sent, 16)
    assert [(span.key, span.start, span.stop) for span in spans] == [(2, 7, 8), (3, 0, 5)]
    sent |= {span.key: Cached(span.stop, (), span.cached.life) for span in spans}
    assert [(span.key, span.start, span.stop) for span in next_spans(cached, sent, 16)] == [(1, 40, 56)]


@given(st.integers(1, 20_000), st.data())
def test_a_damaged_byte_shows(size: int, data: st.DataObject) -> None:
    body = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    at, change = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 255))
    damaged = body.clone()
    damaged[at] ^= change
    assert checksum(damaged) != checksum(body)
    assert checksum(as_bytes(body)) == checksum(body)


def test_pages_in_another_order_show() -> None:
    pages = torch.randint(0, 255, (3, 4096), dtype=torch.uint8)
    assert checksum(pages.flatten()) != checksum(pages[[1, 0, 2]].flatten())


def test_a_sequence_that_starts_anew_is_another_one() -> None:
    index = KvIndex()
    index.adopt(1, 9, [3, 7, 1])  # was on its way here, and never joined
    before = index.snapshot()[1]
    grow(index, 1, (1, 0, 1, [2]))
    now = index.snapshot()[1]
    assert (now.tokens, now.blocks) == (1, (2,))
    assert now.life != before.life
    assert index.copying[1]


def test_what_the_device_is_at_is_copied_a_step_later_unless_somebody_waits_for_it() -> None:
    index, marks = KvIndex(), [Passed(), Passed()]
    for number, mark in enumerate(marks):
        made = plan(number, (1, 4 + number, 1, [3, 7]))
        index.begin(made)
        index.finish(made, mark)
    look = index.look(all_of_it=False)
    assert (look.cached[1].tokens, look.mark) == (5, marks[0])
    look = index.look(all_of_it=True)
    assert (look.cached[1].tokens, look.mark) == (6, marks[1])
    index.nudge(hurry=True)
    assert index.wait(look.changes, 0.0)
    assert index.look(all_of_it=False).cached[1].tokens == 6
    assert index.look(all_of_it=False).cached[1].tokens == 5  # who was in a hurry has seen it


def test_what_keeps_others_waiting_begins_early_in_a_step() -> None:
    tempo = Tempo()
    assert tempo.early(0.0, 9.0)  # no step yet, and it is not known how long the first one takes
    assert tempo.step(1.0).early(1.5, 9.0)
    tempo = tempo.step(1.0).step(1.1)
    moments = (1.11, 1.13, 1.15, 1.19, 1.24, 1.26, 9.0)
    assert [tempo.early(now, 0.09) for now in moments] == [True, True, False, False, False, True, True]
    assert [tempo.early(now, 0.02) for now in moments] == [True, True, True, False, False, True, True]


async def test_what_is_long_waits_for_the_next_step_or_until_there_is_none(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.worker.kv_stream._LONG_S", 9.0)  # longer than a step
    index = KvIndex()
    grow(index, 1, (1, 0, 1, [3, 7, 1]))
    await asyncio.sleep(1.0)
    grow(index, 2, (1, 1, 1, [3, 7, 1]))
    await asyncio.sleep(0.5)  # half a step
    stream = KvStream(keeper.address, "secret", 5, cache(), index, frame_bytes=1 << 20)
    index.adopt(2, 20, [0, 2, 4, 5, 6])
    stream.start()
    try:
        await until(lambda: kept(keeper) == {1: 2}, 0.7)
        await asyncio.sleep(0.2)
        assert kept(keeper) == {1: 2}
        grow(index, 3, (1, 2, 1, [3, 7, 1]))
        await until(lambda: kept(keeper) == {1: 3, 2: 20}, 1.0)
        await asyncio.sleep(0.6)
        index.adopt(4, 12, [8, 9, 10])
        await until(lambda: 4 in kept(keeper))  # no step follows
    finally:
        stream.stop()


class Computing(Passed):
    """A mark of a device that writes to a cache as soon as somebody waits for it."""

    def __init__(self, cells: KvCache) -> None:
        super().__init__(False)
        self._cells = cells

    def synchronize(self) -> None:
        slots = torch.arange(BLOCKS * BLOCK_TOKENS)
        self._cells.scatter(slots, (2, 4), (1, 3), torch.full((2, 2, len(slots), 2, 8), 3.0))
        super().synchronize()


async def test_what_is_copied_is_what_the_device_has_once_it_was_waited_for(keeper: Keeper) -> None:
    source, index = cache(), KvIndex()
    made = plan(1, (1, 0, 6, [3, 7]))
    index.begin(made)
    index.finish(made, Computing(source))
    stream = KvStream(keeper.address, "secret", 5, source, index, frame_bytes=1 << 20)
    stream.start()
    await until(lambda: kept(keeper) == {1: 6})
    (one,) = keeper.holdings([5])
    assert torch.all(extract(keeper.cache(5, (2, 4), (1, 3)), one.blocks, one.tokens, (2, 4), (1, 3)) == 3.0)
    stream.stop()


def test_a_device_is_at_rest_when_nothing_is_launched_or_under_way() -> None:
    index, mark = KvIndex(), Passed(False)
    assert index.at_rest
    step = plan(1, (1, 0, 6, [3, 7]))
    index.begin(step)
    assert not index.at_rest  # also if the step fails now: some of it may be on the device
    index.finish(step, mark)
    assert not index.at_rest
    mark.passed = True
    assert index.at_rest


def test_a_failure_leaves_what_the_device_has_been_through() -> None:
    """Chunks of a prompt are launched one after the other, and a device that waits for a lost peer computes none."""
    index, marks = KvIndex(), [Passed(), Passed(False), Passed(False)]
    for number, mark in enumerate(marks):
        made = plan(number, (1, 4 * number, 4, list(range(3))), (2, 20 + number, 1, [3, 4, 5, 6, 7, 8]))
        index.begin(made)
        index.finish(made, mark)
    assert {key: one.tokens for key, one in index.snapshot().items()} == {1: 12, 2: 23}
    assert {key: one.tokens for key, one in index.computed().items()} == {1: 4, 2: 21}
    marks[1].passed = True
    assert {key: one.tokens for key, one in index.computed().items()} == {1: 8, 2: 22}
    index.catch_up()
    assert index.computed() == index.snapshot()


async def test_nothing_is_added_to_the_copy_of_a_replica_that_has_ended(keeper: Keeper) -> None:
    """Whoever restores from it reads it meanwhile: a stream that goes on would reuse its blocks, or begin anew."""
    index = KvIndex()
    grow(index, 1, (1, 0, 6, [3, 7]))
    stream = KvStream(keeper.address, "secret", 5, cache(), index, frame_bytes=1 << 20)
    stream.start()
    try:
        await until(lambda: kept(keeper) == {1: 6})
        keeper.freeze([5])
        (before,) = keeper.holdings([5])
        grow(index, 2, (1, 6, 1, [3, 7]), (2, 0, 2, [1]))
        await asyncio.sleep(1.2)  # it is refused, and comes again twice
        assert keeper.holdings([5]) == [before]
    finally:
        stream.stop()


def test_nobody_waits_for_the_copy_of_a_long_prompt() -> None:
    index = KvIndex()
    grow(index, 1, (1, 0, 300, list(range(75))), (2, 0, 3, [90]))
    assert index.late({1: 299, 2: 3}, {}) == [2]
    index.follow({1: Kept(index.snapshot()[1].life, 298)})
    assert index.late({1: 299}, {}) == [1]  # it has caught up once
