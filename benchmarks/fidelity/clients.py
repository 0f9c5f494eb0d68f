"""Requests as clients see them: when they were sent, and when every token came."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np

from data.workload import Workload
from serving.api.client import Client
from serving.errors import DeadlineExceeded, QueueFull, Unavailable
from serving.requests import Limits

_FIRST_TOKEN = 8  # ids below are special
WARM_TOKENS = 2  # of every request, while others are still being prefilled


@dataclass(slots=True)
class Stream:
    """One request: `times_s` of its tokens, on the clock of `time.monotonic`, and whether all of them came."""

    prompt_tokens: int
    sent_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    whole: bool = False

    @property
    def first_s(self) -> float:
        """From sending to the first token."""
        return self.times_s[0] - self.sent_s

    @property
    def latency_s(self) -> float:
        """From sending to the last token."""
        return self.times_s[-1] - self.sent_s


class Clients:
    """Sends requests with drawn prompts through one client."""

    def __init__(self, client: Client, vocab: int, seed: int) -> None:
        self._client, self._vocab, self._source = client, vocab, random.Random(seed)

    async def send(
        self,
        prompt_tokens: int,
        output_tokens: int,
        streams: list[Stream] | None = None,
        *,
        model: str = "",
        deadline_s: float | None = None,
    ) -> Stream:
        """One request, to its last token; it is in `streams` from the beginning.

        With a deadline it may be refused or end too early; then it is not `whole`.
        """
        prompt = [self._source.randrange(_FIRST_TOKEN, self._vocab) for _ in range(prompt_tokens)]
        limits, stream = Limits(max_tokens=output_tokens, ignore_eos=True), Stream(prompt_tokens, time.monotonic())
        if streams is not None:
            streams.append(stream)
        chunks = self._client.stream(prompt, limits=limits, detokenize=False, model=model, deadline_s=deadline_s)
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    stream.times_s += [time.monotonic()] * len(chunk.token_ids)
            stream.whole = True
        except (DeadlineExceeded, QueueFull, Unavailable):
            if deadline_s is None:
                raise
        return stream

    async def together(self, prompts: Sequence[int], output_tokens: int, *, model: str = "") -> list[Stream]:
        """Requests with so many tokens each, all at once."""
        return list(await asyncio.gather(*(self.send(prompt, output_tokens, model=model) for prompt in prompts)))

    async def play(self, workload: Workload, began_s: float) -> list[Stream]:
        """Every request of a workload at its time after `began_s`; streams in order of arrival."""

        async with asyncio.TaskGroup() as group:
            sent = []
            for item in workload.requests:  # one after the other: thousands that wait would be in the clients' way
                await asyncio.sleep(max(0.0, began_s + item.arrival_s - time.monotonic()))
                sent.append(group.create_task(self.send(item.input_tokens, item.output_tokens)))
        return [one.result() for one in sent]


def steady_s(streams: Sequence[Stream]) -> float:
    """Mean time from token to token while all streams run."""
    begin_s = max(stream.times_s[WARM_TOKENS] for stream in streams)
    end_s = min(stream.times_s[-1] for stream in streams)
    return float(np.mean([_pace(stream, begin_s, end_s) for stream in streams]))


def _pace(stream: Stream, begin_s: float, end_s: float) -> float:
    times = [time_s for time_s in stream.times_s if begin_s <= time_s <= end_s]
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else stream.times_s[-1] - stream.times_s[-2]


def tokens_per_s(streams: Sequence[Stream], begin_s: float, end_s: float) -> float:
    """Tokens of an interval, all streams together."""
    return sum(begin_s < time_s <= end_s for stream in streams for time_s in stream.times_s) / (end_s - begin_s)
