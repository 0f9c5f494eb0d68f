"""All requests the controller knows, and the one task that makes their tokens durable.

Tokens are taken into memory at once, written in one group per commit, and only then shown to
listeners. While a commit is under way the next group gathers, so its size follows the load.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from tokenizers import Tokenizer

from serving.controller.journal import Journal, JournalFull, StoredRequest
from serving.controller.records import Record, TextScanner
from serving.errors import Aborted, AlreadyExists, NotFound, PerennialError, QueueFull
from serving.messages import Emission
from serving.requests import FinishReason, GenerationRequest
from serving.telemetry import Metrics

logger = logging.getLogger(__name__)

_RETRY_S = 0.5


class Ledger:
    """Records by key and by request id. Requests are read by the tokenizer of their model."""

    def __init__(
        self, journal: Journal, tokenizers: Mapping[str, Tokenizer], metrics: Metrics, *, finished_kept: int
    ) -> None:
        self._journal, self._tokenizers, self._metrics = journal, tokenizers, metrics
        self._finished_kept = finished_kept
        self.records: dict[int, Record] = {}
        self._by_id: dict[str, Record] = {}
        self._finished: deque[int] = deque()
        self._next_key = 1
        self._dirty: dict[int, Record] = {}
        self._after_commit: list[Callable[[], None]] = []
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._commit_forever())

    # -- reading ------------------------------------------------------------------------------------

    def find(self, request_id: str) -> Record:
        """The record of a request id. Raises `NotFound`."""
        record = self._by_id.get(request_id)
        if record is None:
            raise NotFound(f"no request {request_id} is known here; it may have been forgotten after it ended")
        return record

    def known(self, request: GenerationRequest) -> Record | None:
        """The record of the same request submitted before. Raises `AlreadyExists` if it differs."""
        record = self._by_id.get(request.request_id)
        if record is not None and _asked(record.request) != _asked(request):
            raise AlreadyExists(f"request id {request.request_id} is in use by another request; choose another id")
        return record

    def restore(self) -> list[Record]:
        """Bring back what the journal knows; returns the unfinished records in order of admission."""
        unfinished = []
        for stored in self._journal.load(self._finished_kept):
            record = self._restored(stored)
            self._remember(record)
            if record.finish is None:
                unfinished.append(record)
            else:
                self._finished.append(record.key)
        self._next_key = max(self.records, default=0) + 1
        self._journal.trim(self._finished_kept)
        return unfinished

    def _restored(self, stored: StoredRequest) -> Record:
        record = self._record(stored.key, stored.request, age_s=time.time() - stored.admitted)
        output = stored.output
        for index, token in enumerate(output.tokens):
            last = index == len(output.tokens) - 1
            finish = stored.finish if last else None
            if record.finish is None:
                record.append(Emission(stored.key, index, token, output.logprobs[index], output.top[index], finish))
        record.finish, record.ended = stored.finish, stored.finish is not None
        record.committed = record.replayed = len(record.output)  # from here on all of it is computed anew
        return record

    def _record(self, key: int, request: GenerationRequest, *, age_s: float = 0.0) -> Record:
        now = asyncio.get_running_loop().time()
        admitted_at = now - max(0.0, age_s)
        deadline_at = None if request.deadline_s is None else admitted_at + request.deadline_s
        wants_text, tokenizer = request.detokenize or request.limits.stop, self._tokenizers.get(request.model)
        scanner = TextScanner(tokenizer, request.limits.stop) if wants_text and tokenizer else None
        return Record(key, request, admitted_at, deadline_at, scanner, told_at=now)

    def _remember(self, record: Record) -> None:
        self.records[record.key] = record
        self._by_id[record.request.request_id] = record

    # -- writing ------------------------------------------------------------------------------------

    async def admit(self, request: GenerationRequest) -> Record:
        """Journal a new request. Raises `QueueFull` if the journal has no room.

        Cancelled, it leaves nothing behind: the caller never learnt that the request was taken.
        """
        record = self._record(self._next_key, request)
        self._next_key += 1
        self._remember(record)
        try:
            await self._journal.admit(record.key, request, time.time())
        except JournalFull as error:
            refusal = QueueFull(f"{error}; free some space and try again", retry_after_s=5.0)
            self._withdraw(record, refusal)
            raise refusal from error
        except BaseException:
            self._withdraw(record, Aborted("the request was given up while it was admitted"))
            self._journal.withdraw(record.key)
            raise
        return record

    def _withdraw(self, record: Record, reason: PerennialError) -> None:
        """As if it had never been there, except for those who listen already."""
        self._forget(record)
        record.failure, record.finish, record.ended = reason, "abort", True
        record.notify()

    def take(self, record: Record, emission: Emission) -> bool:
        """Add an emission; False if it does not continue the record (it is then ignored)."""
        if record.finish is not None:
            return True
        if emission.token is None:
            if emission.error:
                record.failure = Aborted(emission.error, tokens=len(record.output))
            self.end(record, emission.finish or "abort")
            return True
        if emission.index != len(record.output):
            return emission.index < len(record.output)
        record.append(emission)
        self._mark(record)
        return True

    def end(self, record: Record, reason: FinishReason) -> None:
        """End a record without a further token."""
        if record.finish is None:
            record.close(reason)
            self._mark(record)

    def _mark(self, record: Record) -> None:
        self._dirty[record.key] = record
        self._wake.set()

    def after_commit(self, action: Callable[[], None]) -> None:
        """Call `action` once everything taken so far is durable."""
        self._after_commit.append(action)
        self._wake.set()

    async def _commit_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            dirty, self._dirty = self._dirty, {}
            actions, self._after_commit = self._after_commit, []
            lengths = {key: len(record.output) for key, record in dirty.items()}
            ends = [(key, record.finish) for key, record in dirty.items() if record.finish is not None]
            await self._commit(dirty.values(), ends)
            self._journalled(dirty, lengths, ends)
            for action in actions:
                action()
            await self._shed()

    def _journalled(
        self, dirty: Mapping[int, Record], lengths: Mapping[int, int], ends: list[tuple[int, FinishReason]]
    ) -> None:
        now = asyncio.get_running_loop().time()
        for key, record in dirty.items():
            self._count(record, lengths[key] - record.committed, now)
            record.committed = lengths[key]
        for key, reason in ends:
            dirty[key].ended = True
            self._finished.append(key)
            self._metrics.finished(reason, now - dirty[key].admitted_at)
        for record in dirty.values():
            record.notify()

    def _count(self, record: Record, tokens: int, now: float) -> None:
        if tokens:
            if not record.committed:
                self._metrics.first_token(now - record.admitted_at)
            self._metrics.token_emitted((now - record.told_at) / tokens, tokens)
            record.told_at = now

    async def _commit(self, records: Iterable[Record], ends: list[tuple[int, FinishReason]]) -> None:
        tokens = [
            (record.key, record.committed, record.segment(record.committed))
            for record in records
            if len(record.output) > record.committed
        ]
        if not tokens and not ends:
            return None
        while True:
            try:
                return await self._journal.commit(tokens, ends)
            except PerennialError as error:
                logger.error("%s; streams wait until it does", error)
                await asyncio.sleep(_RETRY_S)

    async def _shed(self) -> None:
        """Forget the oldest finished requests beyond the number kept."""
        surplus = len(self._finished) - self._finished_kept
        if surplus > self._finished_kept // 8:
            keys = [self._finished.popleft() for _ in range(surplus)]
            for key in keys:
                self._forget(self.records[key])
            try:
                await self._journal.forget(keys)
            except PerennialError as error:
                logger.error("%s; finished requests stay in it", error)

    def _forget(self, record: Record) -> None:
        self.records.pop(record.key, None)
        self._by_id.pop(record.request.request_id, None)

    def stop(self) -> None:
        """Stop committing; what is dirty is generated again after a restart."""
        self._task.cancel()


def _asked(request: GenerationRequest) -> tuple[object, ...]:
    """What makes two submissions of one id the same request; how long one waits for it may differ."""
    return request.model, request.prompt, request.sampling, request.limits, request.detokenize
