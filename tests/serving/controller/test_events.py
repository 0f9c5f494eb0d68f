from __future__ import annotations

import asyncio

from serving.controller.events import EventLog


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
