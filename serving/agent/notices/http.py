"""As much HTTP as metadata services need: no thread to wait for, no proxy, no redirect, bounded in time and size."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage, parse_headers
from io import BytesIO
from typing import TypeVar
from urllib.parse import SplitResult, urlsplit

import msgspec

from serving.agent.notices.base import SourceFailed

Document = TypeVar("Document")

_MOST_BYTES = 256 << 10
_RESOLUTION = timedelta(seconds=1)  # of a Date header


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer, and when it came by the local clock."""

    status: int
    headers: HTTPMessage
    body: bytes
    came_at: datetime

    def decode(self, kind: type[Document]) -> Document:
        """The body as a typed document. Raises `SourceFailed` if it is not one."""
        try:
            return msgspec.json.decode(self.body, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise SourceFailed(f"it said something unintelligible ({error}): {self.body[:80]!r}") from error

    def seconds_until(self, moment: datetime) -> float:
        """From when the answer came, by the server's clock, until `moment`; 0 if that has passed.

        The server's clock is known to a second by its Date header; inside that second the local clock
        is believed, outside it is wrong. Without such a header there is only the local clock.
        """
        now = self.came_at
        with contextlib.suppress(ValueError, TypeError):
            date = parsedate_to_datetime(self.headers["Date"]).astimezone(UTC)
            now = min(max(now, date), date + _RESOLUTION)
        return max(0.0, (moment - now).total_seconds())


async def request(method: str, url: str, *, headers: Mapping[str, str], timeout_s: float, body: bytes = b"") -> Answer:
    """One exchange over a connection of its own. Raises `SourceFailed` unless an answer came in time."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _exchange(method, urlsplit(url), headers, body)
    except TimeoutError as error:
        raise SourceFailed(f"{url} did not answer within {timeout_s:g} s") from error
    except (OSError, EOFError, HTTPException, asyncio.LimitOverrunError, ValueError) as error:
        raise SourceFailed(f"{url} cannot be asked: {error}") from error


async def _exchange(method: str, url: SplitResult, headers: Mapping[str, str], body: bytes) -> Answer:
    reader, writer = await asyncio.open_connection(url.hostname, url.port or 80, limit=_MOST_BYTES)
    try:
        writer.write(_head(method, url, {**headers, "Content-Length": str(len(body))} if body else headers) + body)
        await writer.drain()
        status = _status(await reader.readuntil(b"\r\n"))
        fields = await _read_fields(reader)
        return Answer(status, fields, await _read_body(reader, fields), datetime.now(UTC))
    finally:
        writer.transport.abort()  # nothing more is wanted of it, and closing would mean another wait


def _head(method: str, url: SplitResult, headers: Mapping[str, str]) -> bytes:
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {url.netloc}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header would span lines")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _status(line: bytes) -> int:
    version, _, rest = line.partition(b" ")
    if not version.startswith(b"HTTP/1."):
        raise ValueError(f"it does not speak HTTP: {line[:40]!r}")
    return int(rest[:3])


async def _read_fields(reader: asyncio.StreamReader) -> HTTPMessage:
    head = bytearray()
    line = b""
    while line not in (b"\r\n", b"\n"):
        line = await reader.readuntil(b"\n")
        head += line
        _bounded(len(head))
    return parse_headers(BytesIO(head))


async def _read_body(reader: asyncio.StreamReader, fields: HTTPMessage) -> bytes:
    if fields.get("Transfer-Encoding", "").lower() == "chunked":
        return await _read_chunks(reader)
    if (length := fields.get("Content-Length")) is not None:
        return await reader.readexactly(_bounded(int(length)))
    body = b""
    while part := await reader.read(_MOST_BYTES):
        body += part
        _bounded(len(body))
    return body


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readuntil(b"\n")).partition(b";")[0], 16):
        body += await reader.readexactly(_bounded(size))
        _bounded(len(body))
        await reader.readuntil(b"\n")
    return body


def _bounded(size: int) -> int:
    if not 0 <= size <= _MOST_BYTES:
        raise ValueError(f"{size} bytes are not the size of an answer")
    return size
