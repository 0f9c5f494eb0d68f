"""Clouds that give notice to a whole service; nobody who reads a stream may see it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from perennial.scenario import Shape, scenario
from perennial.testing import collect, compare, fleet, reference_streams
from serving.engine.checkpoint import create_checkpoint
from serving.requests import Event
from tests.serving.agent.notices.metadata import Ec2, running

SHAPE = Shape(requests=30, prompt_tokens=(4, 40), output_tokens=(100, 120))
APART_S = 0.25  # together longer than an agent waits between two polls, so some stream is always under way


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    create_checkpoint(str(path), family="llama", layers=4, hidden=64, heads=8, kv_heads=4, ffn=128)
    return str(path)


def says(kind: str, instance: str) -> Callable[[Event], bool]:
    return lambda event: event.kind == kind and event.data.get("instance") == instance


def disturbed(events: Sequence[Event]) -> int:
    """Requests that went to another layout while they were running."""
    layouts = [event.data for event in events if event.kind == "layout"]
    return sum(int(one["requests_moved"]) + int(one["requests_replayed"]) for one in layouts)


@pytest.mark.slow
async def test_a_spot_instance_is_advised_interrupted_and_gone_without_a_lost_token(checkpoint: str) -> None:
    requests = [arrival.request for arrival in scenario(5, SHAPE).arrivals]
    reference = reference_streams(checkpoint, requests)
    ec2 = Ec2()
    async with running(ec2), fleet(checkpoint, instances=1) as service:
        (spot,) = await service.add(1, notices=f"aws={ec2.url}")
        before = await service.wait_serving()
        ec2.rebalance = True
        advised = await service.wait_event(says("advice", spot))
        assert (await service.wait_serving()).positions == before.positions
        ec2.interrupt(120.0)
        service.instances[spot].leaving = True
        async with service.client() as client:
            streams = []
            for request in requests:
                streams.append(asyncio.create_task(collect(client, request)))
                await asyncio.sleep(APART_S)
            await service.wait_event(says("instance_dismissed", spot))
            async with asyncio.timeout(90):
                delivered = await asyncio.gather(*streams)
        assert await service.instances[spot].group.wait(10.0) == 0
        assert await service.reap() == [spot]
        after = await service.wait_serving()
        noticed = await service.wait_event(says("notice", spot))
    since_notice = service.events[service.events.index(noticed) :]
    assert all(not compare(reference[one.request_id], got) for one, got in zip(requests, delivered, strict=True))
    assert disturbed(since_notice) > 0, "there was nothing to lose"
    assert (advised.data["source"], noticed.data["source"]) == ("aws", "aws")
    assert 100.0 < noticed.data["deadline_s"] <= 120.0
    assert {position.device for position in before.positions} == {"i0/0", f"{spot}/0"}
    assert {position.device for position in after.positions} == {"i0/0"}
    assert not {"instance_lost", "replica_failed"} & {event.kind for event in service.events}
