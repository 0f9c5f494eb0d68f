from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec
import pytest

from serving import lifeline
from serving import messages as m
from serving.errors import TransportError
from serving.transport import Connection, JoinRefused, from_below, join

FRAME_BYTES = 1 << 16
HELLO = m.WorkerHello("token", "i", 0, 1)


@dataclass
class Controller:
    """The controller's side of every connection that was accepted, and the other one of those that joined."""

    port: int = 0
    connections: list[Connection[m.Upward]] = field(default_factory=list)
    joined: list[Connection[m.Downward]] = field(default_factory=list)
    answer: Callable[[Connection[m.Upward]], None] = lambda connection: connection.send(m.Welcome())

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = from_below(reader, writer, FRAME_BYTES)
        self.connections.append(connection)
        self.answer(connection)


@asynccontextmanager
async def controller() -> AsyncIterator[Controller]:
    one = Controller()
    server = await asyncio.start_server(one.accept, "127.0.0.1", 0)
    one.port = server.sockets[0].getsockname()[1]
    try:
        yield one
    finally:
        server.close()
        for connection in (*one.connections, *one.joined):
            connection.abort()
        await asyncio.sleep(0.01)


async def joined(one: Controller, silence_s: float = 5.0, timeout_s: float = 2.0) -> Connection[m.Downward]:
    below = await join(one.address, HELLO, frame_bytes=FRAME_BYTES, timeout_s=timeout_s, silence_s=silence_s)
    one.joined.append(below)
    return below


async def test_messages_arrive_as_they_were_sent() -> None:
    async with controller() as one:
        below = await joined(one)
        assert await one.connections[0].receive() == HELLO
        sent = [m.Notice("i", 1.5, "file"), m.Tokens(3, [m.Emission(1, 0, 7, finish="stop")], 1, 2, 0.5)]
        for message in sent:
            below.send(message)
        assert [await one.connections[0].receive() for _ in sent] == sent
        await below.close()
        assert [message async for message in one.connections[0]] == []
        below.send(m.Heartbeat())  # on a closed connection nothing happens


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    "raw",
    [
        frame(b"\xc1"),
        frame(b""),
        frame(msgspec.msgpack.encode(["Heartbeat", "many"])),
        frame(msgspec.msgpack.encode(["Unknown", 1])),
        frame(msgspec.msgpack.encode({"message": "Heartbeat"})),
        frame(b"\x93\xa9Heartbeat\x01" + b"\x91" * 50_000 + b"\xc0"),  # nested deeper than any stack
        (FRAME_BYTES + 1).to_bytes(4, "big") + bytes(10),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["opcode", "empty", "type", "unknown", "map", "deep", "oversized", "http"],
)
async def test_what_is_no_message_ends_the_connection_and_nothing_else(raw: bytes) -> None:
    async with controller() as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        writer.write(raw)
        await reader.readexactly(4)  # the welcome is on its way: the connection was accepted
        with pytest.raises(TransportError):
            await asyncio.wait_for(one.connections[0].receive(), 2.0)
        writer.close()
        await joined(one)


async def test_a_smaller_limit_for_one_message() -> None:
    async with controller() as one:
        below = await joined(one)
        await one.connections[0].receive()
        below.send(m.Notice("x" * 1000, 1.0, "file"))
        with pytest.raises(TransportError, match="exceeds the limit of 100"):
            await one.connections[0].receive(100)


async def test_a_peer_that_stops_reading_is_cut_off() -> None:
    async with controller() as one:
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await reader.readexactly(4)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        above = one.connections[0]
        for _ in range(10_000):
            above.send(m.Rejected("x" * 1000))
            if above.closed:
                break
            await asyncio.sleep(0)
        assert above.closed
        with pytest.raises(TransportError):
            await asyncio.wait_for(above.receive(), 2.0)
        writer.close()


async def test_a_refusal_carries_its_reason() -> None:
    async with controller() as one:
        one.answer = lambda connection: connection.send(m.Rejected("wrong join token"))
        with pytest.raises(JoinRefused, match="refused i: wrong join token"):
            await joined(one)


async def test_nobody_there() -> None:
    async with controller() as one:
        pass
    with pytest.raises(TransportError, match="no controller answers"):
        await joined(one)


@pytest.mark.parametrize("says", [lambda connection: None, lambda connection: connection.send(m.Dismiss())])
async def test_somebody_there_who_is_no_controller(says: Callable[[Connection[m.Upward]], None]) -> None:
    async with controller() as one:
        one.answer = says
        with pytest.raises(TransportError):
            await joined(one, timeout_s=0.2)


async def test_a_controller_that_falls_silent_counts_as_gone() -> None:
    async with controller() as one:
        below = await joined(one, silence_s=0.1)
        with pytest.raises(TransportError, match=r"nothing was heard for 0\.1 s"):
            await asyncio.wait_for(below.receive(), 2.0)
        await below.close()


async def test_persisting_outlives_lost_connections_and_gives_up_in_the_end() -> None:
    loop = asyncio.get_running_loop()
    calls: list[float] = []

    async def serve() -> None:
        calls.append(loop.time())
        if len(calls) > 3:
            raise TransportError("nobody")
        await asyncio.sleep(0.05)

    started = loop.time()
    await asyncio.wait_for(lifeline.persist(serve, give_up_s=0.3, pause_s=0.02), 5.0)
    assert len(calls) > 5
    assert 0.3 <= loop.time() - started < 2.0
