"""Framed, typed messages over TCP: four bytes of length, then msgpack."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

import msgspec

from serving.errors import PerennialError, TransportError
from serving.messages import AgentHello, Downward, Message, Rejected, Upward, Welcome, WorkerHello

_HEADER_BYTES = 4
# Kernels connect, whatever their processes do: two attempts at this are better than the third, later packet of one.
_CONNECT_S = 2.0
_encoder = msgspec.msgpack.Encoder()

Incoming = TypeVar("Incoming")


class JoinRefused(PerennialError):
    """The controller does not want this agent or worker; the message is its reason."""


class Connection(Generic[Incoming]):
    """One control connection. `send` never blocks; a closed peer ends the iteration.

    A peer that stops reading is cut off once `frame_bytes` are unsent. One that says nothing for
    `silence_s` counts as gone.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: msgspec.msgpack.Decoder[Incoming],
        frame_bytes: int,
        silence_s: float | None = None,
    ) -> None:
        self._reader, self._writer, self._decoder = reader, writer, decoder
        self._frame_bytes, self._silence_s = frame_bytes, silence_s
        raw: socket.socket | None = writer.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def expect_acknowledgement(self, within_s: float) -> None:
        """Count the peer as gone when its kernel acknowledges nothing of what was sent for so long.

        A peer that reads nothing until the buffers between are full counts as gone too.
        """
        raw: socket.socket | None = self._writer.get_extra_info("socket")
        if raw is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(within_s * 1000))

    @property
    def host(self) -> str:
        """The peer's address."""
        return str((self._writer.get_extra_info("peername") or ("?",))[0])

    @property
    def closed(self) -> bool:
        """Whether this side has closed or lost the connection."""
        return self._writer.is_closing()

    def send(self, message: Message) -> None:
        """Queue a message. Sending on a closed connection does nothing: its loss is reported by `receive`."""
        if self._writer.is_closing():
            return
        body = _encoder.encode(message)
        self._writer.write(len(body).to_bytes(_HEADER_BYTES, "big") + body)
        transport = self._writer.transport
        if transport.get_write_buffer_size() > self._frame_bytes:
            transport.abort()

    async def receive(self, most_bytes: int | None = None) -> Incoming:
        """The next message, of `most_bytes` or `frame_bytes` at most.

        Raises `TransportError` when the connection ends, falls silent or carries garbage.
        """
        try:
            async with asyncio.timeout(self._silence_s):
                body = await self._read_frame(most_bytes or self._frame_bytes)
            return self._decoder.decode(body)
        except TimeoutError as error:
            raise TransportError(
                "the connection was closed"
                if self._silence_s is None
                else f"nothing was heard for {self._silence_s:g} s"
            ) from error
        except (asyncio.IncompleteReadError, OSError) as error:
            raise TransportError("the connection was closed") from error
        except (msgspec.MsgspecError, RecursionError) as error:
            raise TransportError(f"not a control message: {error}") from error

    async def _read_frame(self, most_bytes: int) -> bytes:
        size = int.from_bytes(await self._reader.readexactly(_HEADER_BYTES), "big")
        if size > most_bytes:
            raise TransportError(f"a frame of {size} bytes exceeds the limit of {most_bytes}")
        return await self._reader.readexactly(size)

    async def __aiter__(self) -> AsyncIterator[Incoming]:
        while True:
            try:
                yield await self.receive()
            except TransportError:
                return

    def abort(self) -> None:
        """Cut the connection now; `receive` ends."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Flush what is queued (for at most a second) and close."""
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            await asyncio.wait_for(self._writer.wait_closed(), 1.0)


def from_below(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, frame_bytes: int) -> Connection[Upward]:
    """The controller's end of a connection."""
    return Connection(reader, writer, msgspec.msgpack.Decoder(Upward), frame_bytes)


async def join(
    address: str,
    hello: AgentHello | WorkerHello,
    *,
    frame_bytes: int,
    timeout_s: float,
    silence_s: float,
    unacknowledged_s: float | None = None,
) -> Connection[Downward]:
    """Connect to the controller at `host:port` and say hello.

    The controller counts as gone when it says nothing for `silence_s`, or its kernel acknowledges nothing
    for `unacknowledged_s`. Raises `TransportError` if nobody welcomes it within `timeout_s`, `JoinRefused`
    if the controller declines.
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(timeout_s):
            async with asyncio.timeout(_CONNECT_S):
                reader, writer = await asyncio.open_connection(host, int(port))
            connection = Connection(reader, writer, msgspec.msgpack.Decoder(Downward), frame_bytes, silence_s)
            if unacknowledged_s is not None:
                connection.expect_acknowledgement(unacknowledged_s)
            return await _welcomed(connection, hello)
    except (OSError, TimeoutError) as error:
        raise TransportError(f"no controller answers at {address}") from error


async def _welcomed(connection: Connection[Downward], hello: AgentHello | WorkerHello) -> Connection[Downward]:
    answer = None
    try:
        connection.send(hello)
        answer = await connection.receive()
        if isinstance(answer, Rejected):
            raise JoinRefused(f"the controller refused {hello.instance}: {answer.reason}")
        if not isinstance(answer, Welcome):
            raise TransportError("the controller answered a hello with something else")
        return connection
    finally:
        if not isinstance(answer, Welcome):
            connection.abort()
