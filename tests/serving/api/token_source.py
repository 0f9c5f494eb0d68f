"""A service with the controller's manners whose tokens are a function of prompt and position.

Its journal is a dict that outlives it, so that a second source can take over where the first was stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.models import ModelSpec
from data.plan import PlanBook
from serving.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    PlanMismatch,
    QueueFull,
    Unavailable,
)
from serving.requests import (
    Chunk,
    Event,
    FinishReason,
    GenerationRequest,
    InstanceInfo,
    PositionInfo,
    ServerInfo,
    TopLogprob,
)
from tests.flows.books import MODEL, book


def token_at(prompt: tuple[int, ...], position: int) -> int:
    """The token that every source draws."""
    return (sum(prompt) * 31 + position * 7) % MODEL.vocab


@dataclass(eq=False)
class Record:
    """One request of the journal."""

    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    listeners: int = 0

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


Journal = dict[str, Record]


class TokenSource:
    """Emits a token per stream and `pace_s`; takes `capacity` requests at a time."""

    def __init__(self, journal: Journal | None = None, *, pace_s: float = 0.001, capacity: int = 64) -> None:
        self.journal: Journal = {} if journal is None else journal
        self.specs: Mapping[str, ModelSpec] = {"": MODEL}
        self.raises: Callable[[], BaseException] | None = None
        self.notices: list[tuple[str, float, str]] = []
        self._pace_s, self._capacity = pace_s, capacity
        self._draining = False
        self._book = book()
        self._tasks = {key: self._start(record) for key, record in self.journal.items() if record.finish is None}

    async def stop(self) -> None:
        """End without finishing anything, as a killed controller does."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def running(self) -> list[str]:
        return [key for key, record in self.journal.items() if record.finish is None]

    async def submit(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        if self.raises is not None:
            raise self.raises()
        known = self.journal.get(request.request_id)
        if known is not None and (known.request.prompt, known.request.sampling) != (request.prompt, request.sampling):
            raise AlreadyExists(f"{request.request_id} is in use by another request")
        if known is None:
            self._admit(request)
        return self.attach(request.request_id, 0)

    def _admit(self, request: GenerationRequest) -> None:
        if self._draining:
            raise Unavailable("draining", retry_after_s=0.05)
        if len(self.running()) >= self._capacity:
            raise QueueFull("the queue is full", retry_after_s=0.25)
        record = self.journal[request.request_id] = Record(request)
        self._tasks[request.request_id] = self._start(record)

    def _start(self, record: Record) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self._emit(record))

    async def _emit(self, record: Record) -> None:
        limits, deadline_s = record.request.limits, record.request.deadline_s
        end = time.monotonic() + (1e9 if deadline_s is None else deadline_s)
        while record.finish is None:
            await asyncio.sleep(self._pace_s)
            if time.monotonic() > end:
                record.finish = "deadline"
            elif record.finish is None:
                record.tokens.append(token_at(record.request.prompt, len(record.tokens)))
                record.finish = "length" if len(record.tokens) == limits.max_tokens else None
            record.wake()

    async def attach(self, request_id: str, resume_from: int) -> AsyncGenerator[Chunk, None]:
        if request_id not in self.journal:
            raise NotFound(f"no request {request_id}")
        record = self.journal[request_id]
        if resume_from > len(record.tokens):
            raise InvalidInput(f"{request_id} has {len(record.tokens)} tokens, not {resume_from}")
        record.listeners += 1
        try:
            async for chunk in self._chunks(record, resume_from):
                yield chunk
        finally:
            record.listeners -= 1
            if record.finish is None and not record.request.resumable:
                await self.abort(request_id)

    async def _chunks(self, record: Record, start: int) -> AsyncGenerator[Chunk, None]:
        while True:
            if len(record.tokens) == start and record.finish is None:
                await record.changed.wait()
                continue
            chunk = _chunk(record, start)
            start += len(chunk.token_ids)
            if chunk.token_ids or chunk.finish in ("stop", "length"):
                yield chunk
            if record.finish == "deadline":
                raise DeadlineExceeded(f"the deadline passed after {start} tokens")
            if record.finish == "abort":
                raise Aborted("aborted", tokens=start)
            if chunk.finish is not None:
                return

    async def abort(self, request_id: str) -> bool:
        if request_id not in self.journal:
            raise NotFound(f"no request {request_id}")
        record = self.journal[request_id]
        if record.finish is not None:
            return False
        record.finish = "abort"
        record.wake()
        return True

    def info(self) -> ServerInfo:
        return ServerInfo(
            model=MODEL.name, family=MODEL.family, max_positions=MODEL.max_positions, vocab=MODEL.vocab,
            state="draining" if self._draining else "serving", epoch=3, config="D1·P2·T1·B4",
            positions=(PositionInfo(replica=0, stage=1, shard=0, device="i-1/0"),),
            instances=(
                InstanceInfo(instance="i-0", type="local-cpu", devices=1, state="ready", zone="eu-1a"),
                InstanceInfo(instance="i-1", type="local-cpu", devices=1, state="leaving", leaving_s=2.5),
            ),
            running=len(self.running()), waiting=0, kv_usage=0.25, plan_source="file", plan_sha256=self._book.sha256,
            plan_version="7",
        )  # fmt: skip

    def plan_book(self) -> PlanBook:
        return self._book

    async def reload_plan(self, source: str) -> str:
        if source == "damaged.json":
            raise PlanMismatch("the checksum of damaged.json is wrong")
        return self._book.sha256

    async def drain(self, timeout_s: float | None) -> int:
        self._draining = True
        tasks = [self._tasks[key] for key in self.running()]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        return len(self.running())

    async def notify(self, instance: str, deadline_s: float, source: str) -> None:
        if instance not in ("i-0", "i-1"):
            raise NotFound(f"no instance {instance}")
        self.notices.append((instance, deadline_s, source))

    async def events(self, since: int) -> AsyncGenerator[Event, None]:
        sequence = since
        while True:
            sequence += 1
            data: dict[str, Any] = {"epoch": sequence, "devices": ["i-0/0"]}
            yield Event(sequence=sequence, time_s=1e9 + sequence, kind="layout", data=data)
            await asyncio.sleep(0.01)

    def decode(self, token_ids: tuple[int, ...], model: str) -> str:
        return "".join(f" {token}" for token in token_ids)

    def encode(self, text: str, model: str) -> tuple[int, ...]:
        return tuple(byte % MODEL.vocab for byte in text.encode())


def _chunk(record: Record, start: int) -> Chunk:
    tokens = tuple(record.tokens[start:])
    wanted = record.request.sampling.logprobs
    return Chunk(
        output_index=start,
        token_ids=tokens,
        text="".join(f" é{token}" for token in tokens) if record.request.detokenize else "",
        logprobs=tuple(-0.5 for _ in tokens) if wanted else (),
        top=tuple(tuple(TopLogprob(token_id=n, logprob=-0.5 - n) for n in range(wanted)) for _ in tokens)
        if wanted
        else (),
        finish=record.finish,
    )
