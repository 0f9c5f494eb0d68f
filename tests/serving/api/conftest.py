from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import pytest

from serving.api import server
from serving.api.client import Client
from serving.api.generated.control_pb2_grpc import ControlStub
from serving.api.generated.inference_pb2_grpc import InferenceStub
from tests.serving.api.token_source import TokenSource


async def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait until `condition` holds; fail if it does not in time."""
    end = time.monotonic() + within_s
    for _ in iter(condition, True):
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.005)


@dataclass(frozen=True)
class Served:
    """A source behind a real socket, and the ways to reach it."""

    source: TokenSource
    server: server.ApiServer
    port: int
    client: Client
    channel: grpc.aio.Channel
    inference: InferenceStub
    control: ControlStub


@asynccontextmanager
async def served(source: TokenSource) -> AsyncIterator[Served]:
    api, port = await server.start(source, message_bytes=1 << 16)
    address = f"127.0.0.1:{port}"
    async with grpc.aio.insecure_channel(address) as channel, Client(address, give_up_s=10) as client:
        yield Served(source, api, port, client, channel, InferenceStub(channel), ControlStub(channel))
    await source.stop()
    await api.stop()


@pytest.fixture
async def service() -> AsyncIterator[Served]:
    async with served(TokenSource()) as running:
        yield running
