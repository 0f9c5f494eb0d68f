"""The clients: requests that run all the time, and a note of when every token of them arrived."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Collection, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Self

from benchmarks.reconfiguration.timeline import Timeline
from serving import lifeline
from serving.api.client import Client
from serving.errors import PerennialError
from serving.requests import Limits

_FIRST_TOKEN = 8  # ids below are special
_POLL_S = 0.01


class Load:
    """`requests` streams at once; one that ends is followed by a new one. Times are `time.monotonic`.

    Use it as an asynchronous context manager; leaving it aborts what runs.
    """

    def __init__(self, client: Client, *, requests: int, prompt_tokens: int, max_tokens: int, vocab: int) -> None:
        self._client, self._requests = client, requests
        self._prompt_tokens, self._limits = prompt_tokens, Limits(max_tokens=max_tokens, ignore_eos=True)
        self._source, self._vocab = random.Random(0), vocab
        self._tasks: list[asyncio.Task[None]] = []
        self._current: dict[int, Timeline] = {}
        self._began = asyncio.Condition()
        self._born = 0
        self.timelines: list[Timeline] = []
        self.errors: list[str] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        gc.unfreeze()

    async def start(self, *, timeout_s: float) -> None:
        """Start the streams and wait until every one has delivered a token. Raises `TimeoutError`."""
        lifeline.settle()  # the instrument's own garbage collection is not the service's latency
        self._current = {}
        self._tasks = [asyncio.create_task(self._run(slot)) for slot in range(self._requests)]
        async with asyncio.timeout(timeout_s), self._began:
            await self._began.wait_for(lambda: len(self._current) == self._requests)

    async def stop(self) -> None:
        """Abort the streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def renew(self, *, timeout_s: float, requests: int = 0) -> None:
        """Abort the streams and start new ones, by default as many."""
        await self.stop()
        self._requests = requests or self._requests
        await self.start(timeout_s=timeout_s)

    async def resumed(self, request_ids: Collection[str], since_s: float, *, timeout_s: float) -> bool:
        """Wait until these requests have ended or delivered a token after `since_s`; False if some did not in time."""
        waiting = [one for one in self.timelines if one.request_id in request_ids]
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:  # a wake-up for every token would make the client the bottleneck
            waiting = [one for one in waiting if not one.ended and (not one.times_s or one.times_s[-1] <= since_s)]
            if not waiting:
                return True
            await asyncio.sleep(_POLL_S)
        return False

    def cached_tokens(self, time_s: float) -> int:
        """Tokens in the KV of the running requests then: all but the newest of each."""
        running = [one for one in self.timelines if one.spans(time_s)]
        return sum(one.prompt_tokens + one.tokens_by(time_s) - 1 for one in running)

    def recent(self, since_s: float) -> Sequence[Timeline]:
        """Requests with tokens after `since_s`."""
        return [one for one in self.timelines if one.times_s and one.times_s[-1] >= since_s]

    async def _run(self, slot: int) -> None:
        while True:
            timeline = Timeline(f"load-{self._born}", self._prompt_tokens)
            self._born += 1
            prompt = [self._source.randrange(_FIRST_TOKEN, self._vocab) for _ in range(self._prompt_tokens)]
            self.timelines.append(timeline)
            try:
                await self._read(slot, timeline, prompt)
            except PerennialError as error:
                self.errors.append(f"{timeline.request_id} after {timeline.tokens} tokens: {error}")
                await asyncio.sleep(0.1)  # not as fast as it can be refused
            finally:
                timeline.ended = True

    async def _read(self, slot: int, timeline: Timeline, prompt: list[int]) -> None:
        chunks = self._client.stream(prompt, limits=self._limits, request_id=timeline.request_id, detokenize=False)
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk.token_ids:
                    timeline.note(time.monotonic(), chunk.output_index, len(chunk.token_ids))
                if self._current.get(slot) is not timeline:
                    await self._begin(slot, timeline)

    async def _begin(self, slot: int, timeline: Timeline) -> None:
        async with self._began:
            self._current[slot] = timeline
            self._began.notify_all()
