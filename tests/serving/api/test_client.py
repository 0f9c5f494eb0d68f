"""Streams that survive connections and servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

import msgspec
import pytest

from serving.api import server
from serving.api.client import Client
from serving.errors import Aborted, BrokenStream, DeadlineExceeded, NotFound, TransportError, Unavailable
from serving.requests import Chunk, Limits, Sampling
from tests.serving.api.conftest import Served, eventually
from tests.serving.api.token_source import Journal, Record, TokenSource, token_at

LONG = Limits(max_tokens=250)
PROMPT = (1, 2, 3)


def expected(tokens: int, prompt: tuple[int, ...] = PROMPT) -> tuple[int, ...]:
    return tuple(token_at(prompt, index) for index in range(tokens))


async def test_a_stream_has_every_token_with_text_and_alternatives(service: Served) -> None:
    answer = await service.client.generate(PROMPT, limits=Limits(max_tokens=9), sampling=Sampling(logprobs=2))
    assert answer.token_ids == expected(9)
    assert answer.text == "".join(f" é{token}" for token in expected(9))
    assert (len(answer.logprobs), len(answer.top), answer.finish) == (9, 9, "length")
    assert [entry.token_id for entry in answer.top[3]] == [0, 1]


async def test_text_and_detokenize(service: Served) -> None:
    answer = await service.client.generate("hi", limits=Limits(max_tokens=2), detokenize=False, model="Tiny/Llama")
    assert (answer.text, len(answer.token_ids)) == ("", 2)


async def test_a_server_that_is_slow_to_take_connections_is_waited_for(service: Served) -> None:
    async with _relay(service.port, wait_s=0.4) as port, Client(f"127.0.0.1:{port}") as client:
        assert (await client.server_info()).model == "Tiny/Llama"


@asynccontextmanager
async def _relay(target: int, wait_s: float) -> AsyncIterator[int]:
    """A port whose connections reach the target port after a while. At the end it closes all of them itself:
    a client's own sockets are closed by its library's threads, perhaps after the event loop is gone."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await asyncio.sleep(wait_s)
        upstream = await asyncio.open_connection("127.0.0.1", target)
        writers.append(upstream[1])
        await asyncio.gather(_pump(reader, upstream[1]), _pump(upstream[0], writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
    for writer in writers:
        writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.close()


@pytest.mark.parametrize("same_port", [True, False])
async def test_streams_go_on_where_they_were_after_the_server_was_restarted(same_port: bool) -> None:
    """Two restarts under 20 streams: the first server is shut down mid-stream, another takes its journal over."""
    journal: Journal = {}
    source = TokenSource(journal, pace_s=0.004)
    api, port = await server.start(source)
    async with Client(lambda: f"127.0.0.1:{port}", give_up_s=20) as client:
        prompts = [(index, 7) for index in range(20)]
        streams = [asyncio.create_task(client.generate(prompt, limits=Limits(max_tokens=150))) for prompt in prompts]
        for _ in range(2):
            tokens = _tokens(journal)
            await eventually(lambda: _tokens(journal) > tokens + 200)  # noqa: B023
            await source.stop()
            await api.stop()
            source = TokenSource(journal, pace_s=0.004)
            api, port = await server.start(source, port=port if same_port else 0)
        answers = await asyncio.wait_for(asyncio.gather(*streams), 20)
    assert [answer.token_ids for answer in answers] == [expected(150, prompt) for prompt in prompts]
    await source.stop()
    await api.stop()


def _tokens(journal: Journal) -> int:
    return sum(len(record.tokens) for record in journal.values())


async def test_several_addresses_are_tried_in_turn(service: Served) -> None:
    async with Client(["127.0.0.1:1", f"127.0.0.1:{service.port}"], give_up_s=5) as client:
        answer = await client.generate(PROMPT, limits=Limits(max_tokens=3))
    assert answer.token_ids == expected(3)


async def test_a_server_that_never_comes_is_given_up() -> None:
    async with Client("127.0.0.1:1", give_up_s=0.3) as client:
        with pytest.raises(Unavailable, match=r"Gave up after 0\.3 s"):
            await client.generate(PROMPT)
        with pytest.raises(TransportError):
            await client.server_info()


async def test_a_request_that_is_not_resumable_ends_with_its_connection(service: Served) -> None:
    stream = service.client.stream(PROMPT, limits=LONG, resumable=False, request_id="fragile")
    async with aclosing(stream):
        await anext(stream)
        await service.server.stop()
        with pytest.raises(TransportError):
            _ = [chunk async for chunk in stream]


@pytest.mark.parametrize("resumable", [True, False])
async def test_closing_a_stream_early_aborts_its_request(service: Served, resumable: bool) -> None:
    stream = service.client.stream(PROMPT, limits=LONG, request_id="enough", resumable=resumable)
    async with aclosing(stream):
        await anext(stream)
    await eventually(lambda: service.source.journal["enough"].finish == "abort")


async def test_cancelling_the_reader_aborts_its_request(service: Served) -> None:
    reader = asyncio.create_task(service.client.generate(PROMPT, limits=LONG, request_id="enough"))
    await eventually(lambda: "enough" in service.source.journal)
    reader.cancel()
    with suppress(asyncio.CancelledError):
        await reader
    assert reader.cancelled()
    await eventually(lambda: service.source.journal["enough"].finish == "abort")


async def test_attach_reads_a_known_request_from_anywhere(service: Served) -> None:
    whole = await service.client.generate(PROMPT, limits=Limits(max_tokens=10), request_id="known")
    rest = [chunk async for chunk in service.client.attach("known", 4)]
    assert rest[0].output_index == 4
    assert tuple(token for chunk in rest for token in chunk.token_ids) == whole.token_ids[4:]
    with pytest.raises(NotFound):
        _ = [chunk async for chunk in service.client.attach("unknown")]


async def test_deadline_and_abort_end_a_stream_with_their_error(service: Served) -> None:
    with pytest.raises(DeadlineExceeded):
        await service.client.generate(PROMPT, limits=LONG, deadline_s=0.05)
    stream = service.client.stream(PROMPT, limits=LONG, request_id="unwanted")
    async with aclosing(stream):
        await anext(stream)
        assert await service.client.abort("unwanted")
        with pytest.raises(Aborted) as aborted:
            _ = [chunk async for chunk in stream]
    assert aborted.value.tokens == len(service.source.journal["unwanted"].tokens)


class Shifted(TokenSource):
    """A source with a bug: every chunk after the first is numbered `shift` too high."""

    shift = 0

    async def _chunks(self, record: Record, start: int) -> AsyncGenerator[Chunk, None]:
        async for chunk in super()._chunks(record, start):
            moved = chunk.output_index + self.shift if chunk.output_index else 0
            yield msgspec.structs.replace(chunk, output_index=moved)


@pytest.mark.parametrize("shift", [-1, 1])
async def test_a_gap_or_a_repeat_is_an_error_and_not_an_answer(shift: int) -> None:
    source = Shifted()
    source.shift = shift
    api, port = await server.start(source)
    async with Client(f"127.0.0.1:{port}") as client:
        with pytest.raises(BrokenStream, match=r"went on at token \d+ where \d+ was due"):
            await client.generate(PROMPT, limits=LONG)
    await source.stop()
    await api.stop()


async def test_a_call_whose_work_was_cancelled_in_the_server_is_tried_again(service: Served) -> None:
    """It must neither stay open without an answer nor look like a cancelled task to the caller."""

    def cancelled_once() -> asyncio.CancelledError:
        service.source.raises = None
        return asyncio.CancelledError()

    service.source.raises = cancelled_once
    answer = await asyncio.wait_for(service.client.generate(PROMPT, limits=Limits(max_tokens=3)), 5)
    assert answer.token_ids == expected(3)
    assert service.source.raises is None
