"""Framed, typed messages over TCP: four bytes of length, then msgpack."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

import msgspec

from serving.errors import TransportError
from serving.messages import Downward, Message, Upward

_HEADER_BYTES = 4
_encoder = msgspec.msgpack.Encoder()

Incoming = TypeVar("Incoming")


class Connection(Generic[Incoming]):
    """One control connection. `send` never blocks; a closed peer ends the iteration.

    A peer that stops reading is cut off once `frame_bytes` are unsent.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: msgspec.msgpack.Decoder[Incoming],
        frame_bytes: int,
    ) -> None:
        self._reader, self._writer, self._decoder = reader, writer, decoder
        self._frame_bytes = frame_bytes
        raw: socket.socket | None = writer.get_extra_info("socket")
        if raw is not None:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

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

    async def receive(self) -> Incoming:
        """The next message. Raises `TransportError` when the connection ends or carries garbage."""
        try:
            size = int.from_bytes(await self._reader.readexactly(_HEADER_BYTES), "big")
            if size > self._frame_bytes:
                raise TransportError(f"a frame of {size} bytes exceeds the limit of {self._frame_bytes}")
            return self._decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise TransportError("the connection was closed") from error
        except msgspec.MsgspecError as error:
            raise TransportError(f"not a control message: {error}") from error

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


async def connect(host: str, port: int, *, frame_bytes: int, timeout_s: float) -> Connection[Downward]:
    """An agent's or worker's end. Raises `TransportError` if the controller cannot be reached."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), timeout_s)
    except (OSError, TimeoutError) as error:
        raise TransportError(f"no controller answers at {host}:{port}") from error
    return Connection(reader, writer, msgspec.msgpack.Decoder(Downward), frame_bytes)
