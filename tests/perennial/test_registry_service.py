"""A service that follows the champion of a registry: new plans, old plans and damaged ones, under live streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from data.plan import PlanBook
from flows.publish import publish
from flows.registry import CHAMPION, Registry, Release
from perennial.processes import ProcessGroup
from perennial.testing import Fleet, collect, compare, fleet, given_plans, reference_streams
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec
from serving.requests import Event, GenerationRequest, Limits, Sampling
from serving.settings import Timeouts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

REQUESTS = [
    GenerationRequest(
        request_id=f"r{number}",
        prompt=tuple(range(10, 18 + 5 * number)),
        sampling=Sampling(temperature=0.8 * (number % 2), seed=number),
        limits=Limits(max_tokens=250, ignore_eos=True),
        resumable=True,
    )
    for number in range(4)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("checkpoint") / "tiny")
    create_checkpoint(path, family="llama", layers=4, hidden=64, heads=4, kv_heads=2, ffn=128)
    return path


@pytest.fixture(scope="module")
def reference(checkpoint: str) -> dict[str, list[int]]:
    return reference_streams(checkpoint, REQUESTS)


def _publish(registry: Registry, checkpoint: str, two_instances: str, alias: str | None = None) -> PlanBook:
    book = given_plans(read_spec(checkpoint), {1: "1x1x1", 2: two_instances})
    publish(registry, Release(book), alias)
    return book


@asynccontextmanager
async def _streams(service: Fleet, reference: dict[str, list[int]], run: str) -> AsyncIterator[None]:
    """Streams that run while something happens; afterwards each must be what it would have been."""
    async with service.client() as client:
        requests = [msgspec.structs.replace(one, request_id=f"{one.request_id}-{run}") for one in REQUESTS]
        running = asyncio.gather(*(collect(client, request) for request in requests))
        try:
            await asyncio.sleep(0.2)
            yield
            delivered = await asyncio.wait_for(running, 60.0)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await running
    assert not any(compare(expected, got) for expected, got in zip(reference.values(), delivered, strict=True))


async def _follows(service: Fleet, since: int, version: str, config: str) -> None:
    """Wait until the service has loaded a version and runs its layout, with requests that lived through it."""
    await service.wait_event(lambda one: one.kind == "plan_loaded" and one.data["version"] == version, since=since)
    layout = await service.wait_event(lambda one: one.kind == "layout", since=since)
    assert layout.data["config"] == config
    assert _requests_in(layout) > 0
    info = await service.wait_serving()
    assert (info.plan_version, info.config) == (version, config)


def _requests_in(layout: Event) -> int:
    return int(layout.data["requests_moved"]) + int(layout.data["requests_replayed"])


async def _said(process: ProcessGroup, sentence: str) -> None:
    async with asyncio.timeout(20.0):
        while sentence not in process.tail(100):  # noqa: ASYNC110 - another process's log
            await asyncio.sleep(0.1)


def _damage(artifacts: Path, book: PlanBook) -> None:
    (path,) = (path for path in artifacts.rglob("plan.json") if path.read_bytes() == book.to_bytes())
    path.write_bytes(path.read_bytes().replace(b'"given"', b'"taken"', 1))


async def test_the_champion_is_followed_and_no_stream_notices(
    checkpoint: str, reference: dict[str, list[int]], tmp_path: Path
) -> None:
    uri, artifacts = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts"
    registry = await asyncio.to_thread(Registry, uri, artifacts)
    first = await asyncio.to_thread(_publish, registry, checkpoint, "1x1x2", CHAMPION)
    name = Release(first).name
    async with fleet(
        checkpoint,
        instances=2,
        registry=uri,
        registry_model=name,
        timeouts=Timeouts(plan_poll_s=0.2),
    ) as service:
        info = await service.wait_serving()
        assert (info.plan_version, info.config, info.plan_sha256) == ("1", "D1·P1·T2·B8", first.sha256)
        await asyncio.to_thread(_publish, registry, checkpoint, "1x2x1")
        third = await asyncio.to_thread(_publish, registry, checkpoint, "2x1x1")
        await asyncio.to_thread(_damage, artifacts, third)
        assert (await service.wait_serving()).plan_version == "1", "published is not promoted"

        since = len(service.events)
        async with _streams(service, reference, "promoted"):
            await asyncio.to_thread(registry.promote, name, "2")
            await _follows(service, since, "2", "D1·P2·T1·B8")

        since = len(service.events)
        async with _streams(service, reference, "rolled-back"):
            assert await asyncio.to_thread(registry.rollback, name) == "1"
            await _follows(service, since, "1", "D1·P1·T2·B8")

        since = len(service.events)
        async with _streams(service, reference, "damaged"):
            await asyncio.to_thread(registry.promote, name, "3")
            assert service.controller is not None
            await _said(service.controller, f"plan {name} version 3 cannot be read")
            assert "the plan in force stays" in service.controller.tail(1)
        info = await service.wait_serving()
        assert (info.plan_version, info.config, info.plan_sha256) == ("1", "D1·P1·T2·B8", first.sha256)
        assert service.events[since:] == []

        await asyncio.to_thread(_publish, registry, checkpoint, "1x1x2", CHAMPION)  # the first book once more
        loaded = await service.wait_event(lambda one: one.kind == "plan_loaded", since=since)
        assert (loaded.data["version"], loaded.data["sha256"]) == ("4", first.sha256)
        assert (await service.wait_serving()).plan_version == "4"
