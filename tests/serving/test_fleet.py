"""Everything that happens to a fleet, happening to a real one; every stream is held against an undisturbed run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from data.plan import PlanBook
from serving.errors import DeadlineExceeded, PlanMismatch, Unavailable
from serving.requests import Event, Limits
from tests.serving.live import LiveFleet, plan_book, tokens_of

STREAMS = 6
CONFIGS = {1: (1, 1, 1), 2: (1, 2, 1), 3: (1, 1, 2)}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFleet]:
    one = LiveFleet(tmp_path_factory.mktemp("fleet"), CONFIGS, instances=2)
    one.start_controller()
    try:
        yield one
    finally:
        assert one.end() == []


@pytest.fixture(scope="module")
def undisturbed() -> list[list[int]]:
    """Filled by the first test that needs it."""
    return []


@asynccontextmanager
async def streams(
    fleet: LiveFleet, undisturbed: list[list[int]], run: str, *, hit: str = "replica_failed"
) -> AsyncIterator[None]:
    """Streams that run while the body disturbs them, and must end as if nothing had happened.

    `hit` is the event that shows that they were disturbed.
    """
    await fleet.ready(2)
    async with fleet.client() as client:
        if not undisturbed:
            undisturbed += await asyncio.gather(*(tokens_of(client, each, "undisturbed") for each in range(STREAMS)))
        since = await last_event(fleet)
        running = asyncio.gather(*(tokens_of(client, each, run) for each in range(STREAMS)))
        try:
            await fleet.until(lambda info: info.running >= 2)
            assert not running.done(), "there is nothing left to disturb"
            yield
            assert await asyncio.wait_for(running, 60.0) == undisturbed
            hits = [event for event in await fleet.events(since) if event.kind == hit]
            assert any(hit != "layout" or _requests_in(event) for event in hits)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await running


def _requests_in(layout: Event) -> int:
    return int(layout.data["requests_moved"]) + int(layout.data["requests_replayed"])


async def kinds(fleet: LiveFleet, since: int) -> list[str]:
    return [event.kind for event in await fleet.events(since)]


async def last_event(fleet: LiveFleet) -> int:
    return max((event.sequence for event in await fleet.events()), default=0)


async def test_a_notice(fleet: LiveFleet, undisturbed: list[list[int]]) -> None:
    await fleet.ready(2)
    since = await last_event(fleet)
    leaving = next(name for name in fleet.processes if name != "controller")
    async with streams(fleet, undisturbed, "notice", hit="layout"), fleet.client() as client:
        await client.notify(leaving, 10.0)
        assert await asyncio.to_thread(fleet.forget, leaving) == 0
    said = await kinds(fleet, since)
    assert "notice" in said
    assert "replica_failed" not in said
    assert said.index("layout") < said.index("instance_dismissed")


@pytest.mark.slow
async def test_sigterm_is_a_notice(fleet: LiveFleet, undisturbed: list[list[int]]) -> None:
    await fleet.ready(2)
    leaving = next(name for name in fleet.processes if name != "controller")
    async with streams(fleet, undisturbed, "sigterm", hit="layout"):
        fleet.processes[leaving].send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(fleet.forget, leaving) == 0


async def test_an_instance_that_is_killed(fleet: LiveFleet, undisturbed: list[list[int]]) -> None:
    await fleet.ready(2)
    victim = next(name for name in fleet.processes if name != "controller")
    async with streams(fleet, undisturbed, "kill"):
        fleet.kill(victim)


@pytest.mark.slow
async def test_an_agent_that_is_killed_takes_its_worker_along(fleet: LiveFleet, undisturbed: list[list[int]]) -> None:
    await fleet.ready(2)
    victim = next(name for name in fleet.processes if name != "controller")
    worker = fleet.worker(victim)
    async with streams(fleet, undisturbed, "agent"):
        fleet.processes[victim].kill()
        fleet.forget(victim)
        worker.wait(5.0)


@pytest.mark.slow
async def test_a_worker_that_hangs_is_killed_and_comes_back(fleet: LiveFleet, undisturbed: list[list[int]]) -> None:
    await fleet.ready(2)
    name = next(name for name in fleet.processes if name != "controller")
    hung = fleet.worker(name)
    async with streams(fleet, undisturbed, "hang"):
        hung.suspend()
        await asyncio.to_thread(hung.wait, 10.0)
    await fleet.ready(2)
    assert fleet.worker(name).pid != hung.pid


@pytest.mark.slow
async def test_an_instance_that_is_frozen_is_lost_and_may_come_back(
    fleet: LiveFleet, undisturbed: list[list[int]]
) -> None:
    await fleet.ready(2)
    name = next(name for name in fleet.processes if name != "controller")
    group = fleet.processes[name].pid
    async with streams(fleet, undisturbed, "freeze"):
        os.killpg(group, signal.SIGSTOP)
        await fleet.until(lambda info: name not in {one.instance for one in info.instances})
        os.killpg(group, signal.SIGCONT)
    await fleet.ready(2)


@pytest.mark.slow
async def test_a_controller_that_is_killed_finds_its_workers_again(
    fleet: LiveFleet, undisturbed: list[list[int]]
) -> None:
    before = await fleet.ready(2)
    workers = {name: fleet.worker(name).pid for name in fleet.processes if name != "controller"}
    async with streams(fleet, undisturbed, "controller", hit="controller_started"):
        fleet.kill("controller")
        await asyncio.sleep(0.3)
        fleet.start_controller()
    (started,) = [event for event in await fleet.events() if event.kind == "controller_started"]
    assert started.data["resumed_requests"] > 0
    first = next(event for event in await fleet.events() if event.kind == "layout")
    assert first.data["moved"]["weights_local_bytes"] > 0, "workers said what they held"
    after = await fleet.ready(2)
    assert after.epoch > before.epoch
    assert {name: fleet.worker(name).pid for name in workers} == workers


async def test_a_controller_with_a_new_journal_takes_the_workers_of_the_old_one(fleet: LiveFleet) -> None:
    """Its epochs begin again below those that the workers have seen."""
    before = await fleet.ready(2)
    fleet.kill("controller")
    for path in fleet.home.glob("journal*"):
        path.unlink()
    fleet.start_controller()
    await fleet.until(lambda info: info.epoch < before.epoch)
    assert (await fleet.ready(2)).epoch == 1


@pytest.mark.slow
async def test_all_capacity_lost_and_returned(fleet: LiveFleet, undisturbed: list[list[int]]) -> None:
    async with streams(fleet, undisturbed, "capacity"):
        for name in [name for name in fleet.processes if name != "controller"]:
            fleet.kill(name)
        await fleet.until(lambda info: info.state == "no_capacity")
        async with fleet.client(give_up_s=0.5) as client:
            with pytest.raises(Unavailable, match="no plan fits"):
                await tokens_of(client, 0, "refused")
        fleet.add()
        fleet.add()
    assert {"no_capacity", "capacity_returned"} <= set(await kinds(fleet, 0))


async def test_cancelling_frees_the_cache_within_a_step(fleet: LiveFleet) -> None:
    await fleet.ready(2)
    async with fleet.client() as client:
        for round_number in range(3):
            stream = client.stream(
                [5, 6, 7], limits=Limits(max_tokens=900, ignore_eos=True), request_id=f"cancelled-{round_number}"
            )
            await anext(stream)
            await fleet.until(lambda info: info.running == 1 and info.kv_usage > 0)
            await stream.aclose()
            started = time.monotonic()
            await fleet.until(lambda info: info.running == 0 and info.kv_usage == 0, within_s=5.0)
            assert time.monotonic() - started < 2.0


async def test_a_deadline_ends_a_request(fleet: LiveFleet) -> None:
    await fleet.ready(2)
    async with fleet.client() as client:
        started = time.monotonic()
        stream = client.stream([5, 6, 7], limits=Limits(max_tokens=900, ignore_eos=True), deadline_s=0.6)
        with pytest.raises(DeadlineExceeded):
            async for _ in stream:
                pass
        assert 0.4 < time.monotonic() - started < 2.0
    await fleet.until(lambda info: info.running == 0 and info.kv_usage == 0, within_s=5.0)


async def test_an_agent_with_a_wrong_token_is_turned_away(fleet: LiveFleet, undisturbed: list[list[int]]) -> None:
    before = await fleet.ready(2)
    name = fleet.add(token="wrong")
    async with fleet.client() as client:
        stream = asyncio.create_task(tokens_of(client, 0, "token", count=400))
        assert await asyncio.to_thread(fleet.forget, name) == 1
        assert (await stream)[: len(undisturbed[0])] == undisturbed[0]
        assert (await client.server_info()).epoch == before.epoch
    said = fleet.log(name)
    assert f"the controller refused {name}: wrong join token" in said
    assert "Traceback" not in said


@pytest.mark.slow
async def test_plans_are_reloaded_and_bad_ones_refused(fleet: LiveFleet, undisturbed: list[list[int]]) -> None:
    good = plan_book(fleet.spec, {**CONFIGS, 2: (1, 1, 2)})
    content = good.to_bytes()
    bad = {
        "checksum": content.replace(b"for a test", b"for a jest", 1),
        "schema": content.replace(b'"schema_version":2', b'"schema_version":9'),
        "garbage": b"{",
    }
    async with streams(fleet, undisturbed, "plan", hit="layout"), fleet.client() as client:
        in_force = (await client.server_info()).plan_sha256
        for name, damaged in bad.items():
            path = fleet.home / f"{name}.json"
            assert damaged != content
            path.write_bytes(damaged)
            with pytest.raises(PlanMismatch):
                await client.reload_plan(str(path))
            assert (await client.server_info()).plan_sha256 == in_force
        path = fleet.home / "good.json"
        path.write_bytes(content)
        assert await client.reload_plan(str(path)) == good.sha256
        await fleet.until(lambda info: info.config.startswith("D1·P1·T2"))
    async with fleet.client() as client:
        assert await client.reload_plan("") == PlanBook.from_bytes(fleet.plan.read_bytes()).sha256


async def test_sigterm_ends_the_controller_and_dismisses_everybody(fleet: LiveFleet) -> None:
    await fleet.ready(2)
    names = list(fleet.processes)
    os.kill(fleet.processes["controller"].pid, signal.SIGTERM)
    assert {name: fleet.forget(name) for name in names} == dict.fromkeys(names, 0)
