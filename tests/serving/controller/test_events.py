from __future__ import annotations

import asyncio

from data.layout import Device, ParallelConfig
from serving.controller.dispatch import Replica
from serving.controller.events import EventLog, layout_event
from serving.controller.orders import Heir
from serving.controller.reconfiguration import Outcome


async def read(log: EventLog, since: int, count: int) -> list[int]:
    events = log.follow(since)
    async with asyncio.timeout(2.0):
        return [(await anext(events)).sequence for _ in range(count)]


async def test_readers_get_what_is_kept_and_then_what_comes() -> None:
    log = EventLog(kept=3)
    for number in range(5):
        log.emit("something", number=number)
    assert await read(log, 0, 3) == [3, 4, 5]
    live = asyncio.create_task(read(log, 5, 2))
    await asyncio.sleep(0)
    log.emit("something")
    log.emit("something")
    assert await live == [6, 7]


async def test_a_reader_of_the_controller_before_starts_again() -> None:
    log = EventLog()
    log.emit("controller_started")
    assert await read(log, 200, 1) == [1]


def test_a_layout_tells_apart_whose_copy_was_complete() -> None:
    one = ParallelConfig(1, 2, 1, 4)
    replica = Replica(7, 3, one, (Device("a", 0), Device("b", 0)), 8)
    heirs = [Heir(key, 5, (), replica, ()) for key in (1, 2, 3, 4)]
    outcome = Outcome(3, [replica], heirs, {}, restored={1: 0, 2: 9, 3: 2}, uncopied=frozenset({2}))
    told = layout_event(outcome, [replica], one, replayed=[("copied", 1), ("uncopied", 4), ("unseated", 8)])
    assert [told[f"requests_{how}"] for how in ("moved", "restored", "replayed")] == [1, 3, 3]
    assert (told["tokens_reexecuted"], told["tokens_reexecuted_uncopied"]) == ([0, 2], [9])
    assert told["tokens_replayed"] == {"copied": [1], "uncopied": [4], "unseated": [8]}
    assert [(one["stage"], one["device"]) for one in told["positions"]] == [(0, "a/0"), (1, "b/0")]
