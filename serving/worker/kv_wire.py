"""How copies of KV travel to the worker that keeps them: a greeting, then frames, and an answer to each.

A message is eight bytes (length of head, length of body), a msgpack head, and a raw body.
"""

from __future__ import annotations

import socket
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from serving.errors import TransportError

_LENGTH_BYTES = 4
_HEAD_BYTES = 4 << 20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Head = TypeVar("Head")


class Greeting(msgspec.Struct, frozen=True, array_like=True):
    """Whose KV follows: that of one rank of `replica`, and the shape of its cache."""

    token: str
    replica: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    head_dim: int
    blocks: int
    block_tokens: int
    dtype: str


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """KV of tokens `start` … `stop` - 1 of sequences (key, start, stop), and those that are over.

    The body is `[tokens of all spans, layers, 2, heads, head_dim]`; `crc` is its `checksum`.
    """

    number: int
    spans: list[tuple[int, int, int]]
    ended: list[int]
    crc: int


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """Frames up to `number` are kept; or why the connection ends."""

    number: int
    refusal: str = ""


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a greeting. Raises `TransportError` for one that no cache has."""
    if name not in _DTYPES:
        raise TransportError(f"a cache of dtype {name} cannot be kept")
    return _DTYPES[name]


def send(connection: socket.socket, head: object, body: memoryview | None = None) -> None:
    """Send one message; blocks until the peer takes it."""
    encoded = msgspec.msgpack.encode(head)
    lengths = len(encoded).to_bytes(_LENGTH_BYTES, "big") + (len(body) if body else 0).to_bytes(_LENGTH_BYTES, "big")
    parts = [memoryview(lengths + encoded), *([body] if body else [])]
    sent = connection.sendmsg(parts)
    for part in parts:
        if sent < len(part):
            connection.sendall(part[sent:])
        sent = max(0, sent - len(part))


class Room:
    """Memory for one body after the other: fresh pages for each would cost more than what is done with it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def of(self, size: int) -> Tensor:
        """`size` bytes, the same as before as far as there were any."""
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        return self._buffer[:size]


def receive(
    connection: socket.socket,
    kind: type[Head],
    *,
    most_bytes: int,
    head_bytes: int = _HEAD_BYTES,
    room: Room | None = None,
) -> tuple[Head, Tensor]:
    """One message: its head, and its body as bytes, in `room` if there is one.

    Raises `TransportError` if it ends, is garbage or too large.
    """
    try:
        lengths = _exactly(connection, 2 * _LENGTH_BYTES).numpy().data
        head_size, body_size = (int.from_bytes(lengths[at : at + _LENGTH_BYTES], "big") for at in (0, _LENGTH_BYTES))
        if head_size > head_bytes or body_size > most_bytes:
            raise TransportError(f"a message of {head_size} + {body_size} bytes exceeds the limit")
        head = msgspec.msgpack.decode(_exactly(connection, head_size).numpy().data, type=kind)
        return head, _exactly(connection, body_size, room)
    except OSError as error:
        raise TransportError("the connection was lost") from error
    except msgspec.MsgspecError as error:
        raise TransportError(f"not a message of KV: {error}") from error


def _exactly(connection: socket.socket, size: int, room: Room | None = None) -> Tensor:
    data = (room or Room()).of(size)
    view = data.numpy().data
    while view:
        count = connection.recv_into(view, 0, socket.MSG_WAITALL)  # in one call, if nothing comes between
        if not count:
            raise TransportError("the connection was closed")
        view = view[count:]
    return data
