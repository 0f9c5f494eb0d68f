"""What a source says, written down while a test goes on."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from serving.agent.notices.base import Notice, Signal, Source, watch


class Heard:
    def __init__(self) -> None:
        self.signals: list[Signal] = []

    @property
    def notices(self) -> list[Notice]:
        return [one for one in self.signals if isinstance(one, Notice)]

    async def until(self, condition: Callable[[], object], within_s: float = 5.0) -> None:
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, self.signals
            await asyncio.sleep(0.005)

    async def count(self, signals: int) -> None:
        await self.until(lambda: len(self.signals) >= signals)


@asynccontextmanager
async def listening(source: Source) -> AsyncIterator[Heard]:
    heard = Heard()

    async def listen() -> None:
        async for signal in watch(source):
            heard.signals.append(signal)

    task = asyncio.create_task(listen())
    try:
        yield heard
        assert not task.done(), "a source must not end"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
