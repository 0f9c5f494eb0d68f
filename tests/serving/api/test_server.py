"""The server as a neighbour: address, health, reflection, control calls, stubs."""

from __future__ import annotations

import asyncio
import socket
from contextlib import aclosing

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from data.plan import PlanBook
from serving.api import generate, server
from serving.api.client import Client
from serving.errors import InvalidInput, QueueFull, Unavailable
from serving.requests import Limits
from tests.serving.api.conftest import Served, eventually, served
from tests.serving.api.token_source import TokenSource

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(service: Served, name: str) -> int:
    stub = health_pb2_grpc.HealthStub(service.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=name))).status)


async def test_a_port_in_use_is_one_sentence(service: Served) -> None:
    with pytest.raises(InvalidInput, match=rf"Cannot listen on 127\.0\.0\.1:{service.port}"):
        await server.start(TokenSource(), port=service.port)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(InvalidInput, match="is the port in use"):
            await server.start(TokenSource(), port=other.getsockname()[1])


async def test_only_the_given_host_is_bound(service: Served) -> None:
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.2", service.port))


async def test_health_follows_set_serving_and_turns_before_a_drain(service: Served) -> None:
    assert [await health(service, name) for name in ("", server.INFERENCE, server.CONTROL)] == [SERVING] * 3
    await service.server.set_serving(False)
    assert [await health(service, name) for name in ("", server.INFERENCE)] == [NOT_SERVING] * 2
    await service.server.set_serving(True)
    stream = asyncio.create_task(service.client.generate([1], limits=Limits(max_tokens=200)))
    await eventually(lambda: bool(service.source.running()))
    drain = asyncio.create_task(service.client.drain(5.0))
    await eventually(lambda: service.source.info().state == "draining")
    assert await health(service, "") == NOT_SERVING
    assert not drain.done()
    assert await health(service, server.CONTROL) == SERVING
    assert len((await stream).token_ids) == 200
    assert await drain == 0


async def test_a_drain_that_runs_out_of_time_says_what_is_left(service: Served) -> None:
    stream = asyncio.create_task(service.client.generate([1], limits=Limits(max_tokens=250)))
    await eventually(lambda: bool(service.source.running()))
    assert await service.client.drain(0.01) == 1
    assert len((await stream).token_ids) == 250


async def test_an_unknown_service_has_no_health(service: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await health(service, "perennial.v1.Nothing")
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services_and_their_methods(service: Served) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(service.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=server.INFERENCE),
    ]
    listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(asked))]
    names = {one.name for one in listed.list_services_response.service}
    assert {server.INFERENCE, server.CONTROL, "grpc.health.v1.Health"} <= names
    assert b"GenerateStream" in described.file_descriptor_response.file_descriptor_proto[0]


async def test_control_calls_say_what_the_service_says(service: Served) -> None:
    assert await service.client.server_info() == service.source.info()
    plan = await service.client.plan()
    assert PlanBook.from_bytes(plan.plan_json) == service.source.plan_book()
    assert (plan.sha256, plan.source, plan.version) == (service.source.plan_book().sha256, "file", "7")
    assert await service.client.reload_plan() == plan.sha256
    await service.client.notify("i-1", 30.0)
    await service.client.notify("i-0", 0.0, "aws")
    assert service.source.notices == [("i-1", 30.0, "api"), ("i-0", 0.0, "aws")]


async def test_events_come_from_where_the_watcher_was(service: Served) -> None:
    async with aclosing(service.client.watch_events(since=41)) as events:
        seen = [await anext(events) for _ in range(3)]
    assert [event.sequence for event in seen] == [42, 43, 44]
    assert seen[0].data == {"epoch": 42, "devices": ["i-0/0"]}
    assert seen[0].kind == "layout"


async def test_a_full_queue_is_waited_for_until_the_client_gives_up() -> None:
    async with served(TokenSource(capacity=1)) as service:
        first = asyncio.create_task(service.client.generate([1], limits=Limits(max_tokens=150)))
        await eventually(lambda: bool(service.source.running()))
        with pytest.raises(Unavailable, match=r"Gave up after 0\.1 s without progress: the queue is full") as failure:
            await _impatient(service)
        assert isinstance(failure.value.__cause__, QueueFull)
        second = await service.client.generate([2], limits=Limits(max_tokens=3))
        assert len(second.token_ids) == 3
        assert len((await first).token_ids) == 150


async def _impatient(service: Served) -> None:
    async with Client(f"127.0.0.1:{service.port}", give_up_s=0.1) as client:
        await client.generate([9])


def test_the_committed_stubs_are_current() -> None:
    stubs = generate.render()
    assert generate.outdated(stubs) == []
    assert generate.outdated({**stubs, "control_pb2.py": "older"}) == ["control_pb2.py"]
    assert generate.outdated({**stubs, "new_pb2.py": ""}) == ["new_pb2.py"]
