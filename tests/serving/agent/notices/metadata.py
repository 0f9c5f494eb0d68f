"""Metadata services as the clouds document them, over real sockets, with faults on demand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class MetadataServer:
    """An HTTP server on a free port of 127.0.0.1.

    `faults` are taken one a request: a status, `hang`, `cut` (half an answer), `drop` (none at all),
    `garbage` (not HTTP), `drip` (a byte now and then), `endless` (no end of the headers) or `malformed`
    (a body that is none). `fault` is in force for every request. `skew_s` is how far the server's clock
    is ahead.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[int | str] = []
        self.fault: int | str = ""
        self.skew_s = 0.0
        self.date = True
        self.chunked = False
        self._server: asyncio.Server | None = None
        self._port = 0
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def now(self) -> datetime:
        """The time by the server's clock."""
        return datetime.now(UTC) + timedelta(seconds=self.skew_s)

    async def start(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def answer(self, request: Request) -> Reply:
        raise NotImplementedError

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            request = await _read(reader)
            self.requests.append(request)
            fault = self.faults.pop(0) if self.faults else self.fault
            await self._reply(writer, fault, request)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _reply(self, writer: asyncio.StreamWriter, fault: int | str, request: Request) -> None:
        if fault == "hang":
            await asyncio.sleep(30.0)
        elif fault == "drop":
            writer.transport.abort()
        elif fault == "garbage":
            writer.write(b"220 mail.example.org ESMTP\r\n")
        elif fault == "endless":
            writer.write(b"HTTP/1.1 200 OK\r\n" + b"X-More: and more\r\n" * 40_000)
        elif isinstance(fault, int):
            writer.write(self._render(Reply(fault)))
        else:
            reply = await self.answer(request)
            if fault == "malformed":
                reply = Reply(200, b'{"action": ', reply.headers)
            await _send(writer, self._render(reply), fault)
        with contextlib.suppress(ConnectionError):
            await writer.drain()

    def _render(self, reply: Reply) -> bytes:
        headers = {"Date": format_datetime(self.now.replace(microsecond=0), usegmt=True)} if self.date else {}
        headers |= reply.headers
        body = reply.body
        if self.chunked:
            headers["Transfer-Encoding"] = "chunked"
            body = (
                b"".join(b"%x;x=y\r\n%b\r\n" % (len(part), part) for part in (body[:5], body[5:]) if part)
                + b"0\r\n\r\n"
            )
        else:
            headers["Content-Length"] = str(len(body))
        lines = [f"HTTP/1.1 {reply.status} whatever", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def _read(reader: asyncio.StreamReader) -> Request:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    method, target, _ = lines[0].split(" ")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    query = {name: values[0] for name, values in parse_qs(urlsplit(target).query).items()}
    return Request(method, urlsplit(target).path, query, headers, body)


async def _send(writer: asyncio.StreamWriter, data: bytes, fault: int | str) -> None:
    if fault == "cut":
        writer.write(data[: len(data) - 3])
    elif fault == "drip":
        for byte in data:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)
    else:
        writer.write(data)


class Ec2(MetadataServer):
    """The instance metadata service of EC2, version 2 only."""

    def __init__(self) -> None:
        super().__init__()
        self.ttl_s = 21600
        self.tokens: set[str] = set()
        self.action: bytes | None = None
        self.rebalance = False

    def interrupt(self, seconds: float, action: str = "terminate") -> None:
        """Announce an interruption, by the server's clock and in its resolution."""
        ends_at = (self.now + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.action = json.dumps({"action": action, "time": ends_at}).encode()

    async def answer(self, request: Request) -> Reply:
        if request.path == "/latest/api/token":
            return self._token(request)
        if request.headers.get("x-aws-ec2-metadata-token") not in self.tokens:
            return Reply(401)
        if request.path == "/latest/meta-data/spot/instance-action" and self.action is not None:
            return Reply(200, self.action)
        if request.path == "/latest/meta-data/events/recommendations/rebalance" and self.rebalance:
            return Reply(200, json.dumps({"noticeTime": "2026-11-21T08:22:00Z"}).encode())
        return Reply(404, b"<html>not found</html>")

    def _token(self, request: Request) -> Reply:
        asked = request.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if request.method != "PUT":
            return Reply(405)
        if not asked.isdigit() or not 1 <= int(asked) <= 21600:
            return Reply(400)
        token = secrets.token_urlsafe(16)
        self.tokens.add(token)
        return Reply(200, token.encode(), {"X-aws-ec2-metadata-token-ttl-seconds": str(self.ttl_s)})


class ComputeEngine(MetadataServer):
    """The metadata server of Compute Engine: `instance/preempted` with long polls."""

    def __init__(self) -> None:
        super().__init__()
        self.flavor = "Google"
        self.holds = True
        self._value, self._etag = "FALSE", "a0"
        self._changed = asyncio.Event()

    def set(self, value: str) -> None:
        self._value, self._etag = value, f"b{int(self._etag[1:]) + 1}"
        self._changed.set()
        self._changed = asyncio.Event()

    async def answer(self, request: Request) -> Reply:
        if request.headers.get("metadata-flavor") != "Google":
            return Reply(403, b"Missing Metadata-Flavor:Google header.")
        if request.path != "/computeMetadata/v1/instance/preempted":
            return Reply(404)
        if (
            request.query.get("wait_for_change") == "true"
            and request.query.get("last_etag") == self._etag
            and self.holds
        ):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), float(request.query["timeout_sec"]))
        return Reply(200, self._value.encode(), {"Metadata-Flavor": self.flavor, "ETag": self._etag})


class AzureMetadata(MetadataServer):
    """Scheduled Events and the name of the VM."""

    def __init__(self, vm: str = "spot-vmss_3") -> None:
        super().__init__()
        self.vm = vm
        self.events: list[dict[str, Any]] = []
        self.acknowledged: list[str] = []
        self.enabling_s = 0.0

    def schedule(self, seconds: float | None, *resources: str, kind: str = "Preempt", event: str = "e-1") -> None:
        """Announce an event in `seconds`; None is one that has begun."""
        at = "" if seconds is None else format_datetime(self.now + timedelta(seconds=seconds), usegmt=True)
        self.events.append(
            {
                "EventId": event,
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": list(resources or [self.vm]),
                "EventStatus": "Started" if seconds is None else "Scheduled",
                "NotBefore": at,
                "Description": "",
                "EventSource": "Platform",
                "DurationInSeconds": -1,
            }
        )

    async def answer(self, request: Request) -> Reply:
        if request.headers.get("metadata") != "true" or "api-version" not in request.query:
            return Reply(400, b'{"error": "Bad request"}')
        if request.path == "/metadata/instance/compute/name" and request.query.get("format") == "text":
            return Reply(200, self.vm.encode())
        if request.path != "/metadata/scheduledevents" or request.query["api-version"] != "2020-07-01":
            return Reply(404)
        if request.method == "POST":
            return self._acknowledge(json.loads(request.body))
        await asyncio.sleep(self.enabling_s)
        return Reply(200, json.dumps({"DocumentIncarnation": len(self.events), "Events": self.events}).encode())

    def _acknowledge(self, body: dict[str, list[dict[str, str]]]) -> Reply:
        identities = [one["EventId"] for one in body["StartRequests"]]
        if not set(identities) <= {event["EventId"] for event in self.events}:
            return Reply(400)
        self.acknowledged += identities
        for event in self.events:
            if event["EventId"] in identities:
                event.update(EventStatus="Started", NotBefore="")
        return Reply(200)


@asynccontextmanager
async def running(server: MetadataServer) -> AsyncIterator[MetadataServer]:
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
