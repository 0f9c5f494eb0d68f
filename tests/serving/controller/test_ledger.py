from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from serving.controller.journal import Journal
from serving.controller.ledger import Ledger
from serving.controller.records import Record
from serving.errors import Aborted, AlreadyExists, NotFound, QueueFull
from serving.messages import Emission
from serving.requests import Chunk, FinishReason, GenerationRequest, Limits, Sampling
from serving.telemetry import Metrics


def request(name: str, *prompt: int, stop: tuple[str, ...] = ()) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt=prompt or (1, 2), limits=Limits(stop=stop))


@asynccontextmanager
async def opened(path: Path, tokenizer: Tokenizer, finished_kept: int = 10, **options: int) -> AsyncIterator[Ledger]:
    journal = Journal(str(path), **options)
    ledger = Ledger(journal, {"": tokenizer}, Metrics(), finished_kept=finished_kept)
    try:
        yield ledger
    finally:
        ledger.stop()
        await asyncio.sleep(0)
        journal.close()


def take(ledger: Ledger, record: Record, *tokens: int, finish: FinishReason | None = None) -> None:
    start = len(record.output)
    ends = [*[None] * (len(tokens) - 1), finish]
    for at, (token, end) in enumerate(zip(tokens, ends, strict=True), start):
        assert ledger.take(record, Emission(record.key, at, token, finish=end))


async def whole(record: Record) -> list[Chunk]:
    async with asyncio.timeout(5.0):
        return [chunk async for chunk in record.chunks(0)]


async def durable(ledger: Ledger) -> None:
    done = asyncio.Event()
    ledger.after_commit(done.set)
    await asyncio.wait_for(done.wait(), 5.0)


async def test_tokens_are_shown_in_order_and_only_once_they_are_durable(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path / "journal", tokenizer) as ledger:
        record = await ledger.admit(request("r"))
        take(ledger, record, 5, 6)
        assert (record.output, record.committed) == ([5, 6], 0)
        await durable(ledger)
        assert record.committed == 2
        take(ledger, record, 7, finish="length")
        assert not record.ended
        chunks = await whole(record)
    assert [token for chunk in chunks for token in chunk.token_ids] == [5, 6, 7]
    assert chunks[-1].finish == "length"


async def test_repeated_tokens_are_ignored_and_gaps_are_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path / "journal", tokenizer) as ledger:
        record = await ledger.admit(request("r"))
        take(ledger, record, 5, 6)
        assert ledger.take(record, Emission(record.key, 0, 9))
        assert not ledger.take(record, Emission(record.key, 3, 9))
        assert record.output == [5, 6]
        ledger.end(record, "abort")
        assert ledger.take(record, Emission(record.key, 2, 9))
        assert record.output == [5, 6]


async def test_each_token_and_each_end_is_counted_once_whoever_listens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path / "journal", tokenizer) as ledger:
        record = await ledger.admit(request("r"))
        take(ledger, record, 5, 6, finish="length")
        await asyncio.gather(whole(record), whole(record))
        aborted = await ledger.admit(request("aborted"))
        take(ledger, aborted, 7)
        ledger.end(aborted, "abort")
        await durable(ledger)
        value = ledger._metrics.registry.get_sample_value
        assert value("perennial_generation_tokens_total") == 3
        assert value("perennial_time_to_first_token_seconds_count") == 2
        assert value("perennial_inter_token_latency_seconds_count") == 3
        assert value("perennial_request_success_total", {"finished_reason": "length"}) == 1
        assert value("perennial_request_success_total", {"finished_reason": "abort"}) == 1


async def test_an_end_without_a_token_says_why(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path / "journal", tokenizer) as ledger:
        record = await ledger.admit(request("r"))
        take(ledger, record, 5)
        ledger.take(record, Emission(record.key, 1, None, finish="abort", error="it does not fit"))
        with pytest.raises(Aborted, match="it does not fit"):
            await whole(record)


async def test_a_restart_brings_back_every_request_as_it_was(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stop = tokenizer.encode("STOP", add_special_tokens=False).ids
    async with opened(tmp_path / "journal", tokenizer) as ledger:
        running = await ledger.admit(request("running", 3, 4))
        take(ledger, running, 7, 8)
        ended = await ledger.admit(request("ended", stop=("STOP",)))
        take(ledger, ended, 70, 71, *stop)
        fresh = await ledger.admit(request("fresh"))
        await durable(ledger)
        before = await whole(ended)
        assert ended.finish == "stop"
    async with opened(tmp_path / "journal", tokenizer) as ledger:
        assert [record.key for record in ledger.restore()] == [running.key, fresh.key]
        again = ledger.find("running")
        assert (again.output, again.committed, again.finish) == ([7, 8], 2, None)
        (chunk,) = await whole(ledger.find("ended"))
        assert chunk.token_ids == tuple(token for one in before for token in one.token_ids)
        assert chunk.text == "".join(one.text for one in before)
        assert (await ledger.admit(request("new"))).key == fresh.key + 1


async def test_request_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path / "journal", tokenizer) as ledger:
        assert ledger.known(request("r", 1)) is None
        record = await ledger.admit(request("r", 1))
        assert ledger.known(request("r", 1)) is record
        others = [
            request("r", 2),
            request("r", 1, stop=("x",)),
            msgspec.structs.replace(record.request, sampling=Sampling(seed=1)),
            msgspec.structs.replace(record.request, detokenize=False),
        ]
        for other in others:
            with pytest.raises(AlreadyExists, match="another request"):
                ledger.known(other)
        assert ledger.known(msgspec.structs.replace(record.request, deadline_s=1.0, resumable=True)) is record
        with pytest.raises(NotFound):
            ledger.find("unknown")


async def test_old_finished_requests_are_forgotten_and_running_ones_never(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path / "journal", tokenizer, finished_kept=8) as ledger:
        running = await ledger.admit(request("running"))
        for number in range(40):
            take(ledger, await ledger.admit(request(f"r{number}")), 5, finish="stop")
            await durable(ledger)
        await durable(ledger)
        assert ledger.find("running") is running
        assert 8 <= len(ledger.records) - 1 <= 10
        with pytest.raises(NotFound):
            ledger.find("r0")
        assert (await ledger.admit(request("r0"))).output == []
    async with opened(tmp_path / "journal", tokenizer, finished_kept=8) as ledger:
        assert [record.request.request_id for record in ledger.restore()] == ["running", "r0"]


async def test_a_restart_forgets_what_it_does_not_keep(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path / "journal", tokenizer, finished_kept=100) as ledger:
        await ledger.admit(request("running"))
        for number in range(12):
            take(ledger, await ledger.admit(request(f"r{number}")), 5, finish="stop")
        await durable(ledger)
    kept = ["running", *(f"r{number}" for number in range(4, 12))]
    async with opened(tmp_path / "journal", tokenizer, finished_kept=8) as ledger:
        assert [record.request.request_id for record in ledger.restore()] == ["running"]
        assert list(ledger._by_id) == kept
        await ledger.admit(request("r0"))  # its id is free again
        assert [one.request.request_id for one in ledger._journal.load(100)] == [*kept, "r0"]


async def test_an_admission_that_is_cancelled_leaves_nothing_behind(tmp_path: Path, tokenizer: Tokenizer) -> None:
    async with opened(tmp_path / "journal", tokenizer) as ledger:
        admission = asyncio.create_task(ledger.admit(request("r")))
        await asyncio.sleep(0)
        record = ledger.find("r")
        admission.cancel()
        with pytest.raises(asyncio.CancelledError):
            await admission
        with pytest.raises(Aborted):
            await whole(record)  # somebody may have attached meanwhile
        with pytest.raises(NotFound):
            ledger.find("r")
        again = await ledger.admit(request("r"))
    async with opened(tmp_path / "journal", tokenizer) as ledger:
        assert [record.key for record in ledger.restore()] == [again.key]


async def _admit_for_ever(ledger: Ledger) -> None:
    for number in range(100_000):
        await ledger.admit(request(f"r{number}", *range(400)))


async def test_a_full_journal_refuses_and_running_streams_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    limits = {"reserve_bytes": 1 << 18, "max_bytes": 1 << 20}
    async with opened(tmp_path / "journal", tokenizer, finished_kept=1, **limits) as ledger:
        record = await ledger.admit(request("first"))
        with pytest.raises(QueueFull, match="free some space"):
            await _admit_for_ever(ledger)
        for _ in range(50):
            take(ledger, record, *range(20))
            await durable(ledger)
        take(ledger, record, 1, finish="length")
        assert sum(len(chunk.token_ids) for chunk in await whole(record)) == 1001
        with pytest.raises(QueueFull):
            await ledger.admit(request("late", *range(400)))
        with pytest.raises(NotFound):
            ledger.find("late")


async def test_streams_wait_while_nothing_can_be_written_and_go_on_after(tmp_path: Path, tokenizer: Tokenizer) -> None:
    limits = {"reserve_bytes": 1 << 16, "max_bytes": 1 << 20}
    async with opened(tmp_path / "journal", tokenizer, finished_kept=0, **limits) as ledger:
        record = await ledger.admit(request("first"))
        with contextlib.suppress(QueueFull):
            await _admit_for_ever(ledger)
        stuck = False
        while not stuck:
            take(ledger, record, *range(100))
            try:
                await asyncio.wait_for(durable(ledger), 0.2)
            except TimeoutError:
                stuck = True
        assert record.committed < len(record.output)
        # room comes from outside: here, from requests that somebody deletes
        await ledger._journal.forget([key for key in ledger.records if key != record.key])
        take(ledger, record, 1, finish="length")
        chunks = await whole(record)
        assert sum(len(chunk.token_ids) for chunk in chunks) == len(record.output)
