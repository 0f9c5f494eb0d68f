"""Two models on one real fleet: every stream is that of its model alone on one device."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import pytest

from data.deployment import Hosted, SharedGroup
from perennial.scenario import Shape, scenario
from perennial.testing import collect, compare, fleet, given_groups, reference_streams
from serving.engine.checkpoint import create_checkpoint
from serving.errors import InvalidInput, NotFound, Unavailable
from serving.requests import GenerationRequest

SHAPE = Shape(requests=6, prompt_tokens=(4, 40), output_tokens=(100, 140))


@dataclass(frozen=True)
class Models:
    """Checkpoints by name; requests that ask for one after the other; and what each must answer."""

    checkpoints: Mapping[str, str]
    requests: list[GenerationRequest]
    expected: dict[str, list[int]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    home = tmp_path_factory.mktemp("checkpoints")
    create_checkpoint(str(home / "a"), family="llama", layers=4, hidden=64, heads=8, kv_heads=4, ffn=128)
    create_checkpoint(str(home / "b"), family="qwen3", seed=1, layers=3, hidden=48, heads=4, kv_heads=2, ffn=96)
    names = ["small/a", "b"]
    checkpoints = {"small/a": str(home / "a"), "b": str(home / "b")}
    requests = [
        msgspec.structs.replace(arrival.request, model=names[index % 2])
        for index, arrival in enumerate(scenario(5, SHAPE).arrivals)
    ]
    expected: dict[str, list[int]] = {}
    for name in names:
        expected |= reference_streams(checkpoints[name], [one for one in requests if one.model == name])
    return Models(checkpoints, requests, expected)


def both(stages: int, shards: int) -> SharedGroup:
    return SharedGroup(stages, shards, (Hosted("small/a", 4, 0.5), Hosted("b", 4, 0.5)))


@pytest.mark.slow
async def test_two_models_share_a_group_through_changes_and_a_kill(models: Models) -> None:
    plan = given_groups(models.checkpoints, {1: [both(1, 1)], 2: [both(1, 2)], 3: [both(2, 1), both(1, 1)]})
    async with fleet(models.checkpoints, instances=2, plan=plan) as service, service.client() as client:
        with pytest.raises(NotFound, match="this server has 'small/a', 'b'"):
            await client.generate([5, 6, 7], model="c")
        with pytest.raises(InvalidInput, match="names no model"):
            await client.generate([5, 6, 7])
        streams = [asyncio.create_task(collect(client, request)) for request in models.requests]
        await asyncio.sleep(0.3)
        await service.add(1)
        await service.wait_event(lambda event: event.kind == "layout" and len(event.data["positions"]) == 6)
        await service.kill("i0")
        async with asyncio.timeout(60):
            delivered = await asyncio.gather(*streams)
        info = await service.wait_serving()
    assert [(one.name, one.replicas) for one in info.models] == [("small/a", 1), ("b", 1)]
    assert {position.model for position in info.positions} == {"small/a", "b"}
    differences = [
        compare(models.expected[one.request_id], got) for one, got in zip(models.requests, delivered, strict=True)
    ]
    assert not any(differences)


@pytest.mark.slow
async def test_a_model_without_a_place_waits_for_one_over_a_restart_of_the_controller(models: Models) -> None:
    plan = given_groups(models.checkpoints, {1: [SharedGroup(1, 1, (Hosted("b", 8),))], 2: [both(2, 1)]})
    async with fleet(models.checkpoints, instances=2, plan=plan) as service, service.client() as client:
        streams = [asyncio.create_task(collect(client, request)) for request in models.requests]
        await asyncio.sleep(0.3)
        await service.notice("i0", 10.0)
        await service.wait_event(lambda event: event.kind == "instance_dismissed")
        async with service.client(give_up_s=0.5) as hasty:
            with pytest.raises(Unavailable, match="no place for 'small/a'"):
                await hasty.generate([5, 6, 7], model="small/a")
        await service.kill_controller()
        await service.restart_controller()
        await service.add(1)
        async with asyncio.timeout(60):
            delivered = await asyncio.gather(*streams)
    expected = [models.expected[request.request_id] for request in models.requests]
    assert not any(compare(want, got) for want, got in zip(expected, delivered, strict=True))


@pytest.mark.slow
async def test_groups_of_different_shapes_live_through_notices_kills_and_additions(models: Models) -> None:
    alone = SharedGroup(1, 1, (Hosted("b", 8),))
    plan = given_groups(
        models.checkpoints,
        {1: [both(1, 1)], 2: [both(1, 1), alone], 3: [both(2, 1), alone], 4: [both(1, 2), both(1, 1), alone]},
    )
    requests = [
        msgspec.structs.replace(request, request_id=f"{request.request_id}-{copy}")
        for copy in range(4)
        for request in models.requests
    ]
    async with fleet(models.checkpoints, instances=4, plan=plan) as service, service.client() as client:
        streams = [asyncio.create_task(collect(client, request)) for request in requests]
        await asyncio.sleep(0.5)
        await service.notice("i0", 2.0)
        await service.wait_event(lambda event: event.kind == "instance_dismissed")
        info = await service.wait_serving()
        victim = next(position.device.partition("/")[0] for position in info.positions if position.model == "small/a")
        await service.kill(victim)
        await service.wait_event(lambda event: event.kind == "layout" and event.data["mode"] == "recovery")
        await service.add(2)
        async with asyncio.timeout(120):
            delivered = await asyncio.gather(*streams)
        info = await service.wait_serving()
        layouts = [event.data for event in service.events if event.kind == "layout"]
    expected = [models.expected[request.request_id.rpartition("-")[0]] for request in requests]
    assert not any(compare(want, got) for want, got in zip(expected, delivered, strict=True))
    assert [(one.name, one.replicas) for one in info.models] == [("small/a", 2), ("b", 3)]
    assert sum(layout["requests_moved"] for layout in layouts) > 0
    assert sum(layout["requests_restored"] + layout["requests_replayed"] for layout in layouts) > 0
