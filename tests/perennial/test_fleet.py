import asyncio
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from perennial.processes import ProcessGroup, gone, living
from perennial.scenario import Shape, scenario
from perennial.testing import (
    Fleet,
    Instance,
    Leftovers,
    StartFailed,
    collect,
    compare,
    fleet,
    given_plans,
    reference_streams,
)
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec
from serving.requests import GenerationRequest, Limits, Sampling
from serving.settings import ServingSettings

SHAPE = Shape(requests=6, prompt_tokens=(4, 40), output_tokens=(150, 200))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    create_checkpoint(str(path), family="llama", layers=4, hidden=64, heads=8, kv_heads=4, ffn=128)
    return str(path)


def test_instances_share_given_gpus_evenly_and_have_their_own_otherwise(tmp_path: Path) -> None:
    settings = ServingSettings(checkpoint="", journal="", token="")
    for gpus, expected in (((), [0, 1, 2, 3]), ((0, 1), [0, 1, 0, 1]), ((5,), [5, 5, 5, 5])):
        service = Fleet(settings, home=tmp_path, gpus=gpus)
        for name in "abcd":
            service.instances[name] = Instance(name, None, service._choose_gpus())
        assert [instance.gpus for instance in service.instances.values()] == [(gpu,) for gpu in expected]
        lost = service.instances.pop("b").gpus
        assert service._choose_gpus() == lost, "the one whose instance is gone is the least used"


async def test_streams_survive_notice_kill_addition_and_a_new_controller(checkpoint: str) -> None:
    requests = [arrival.request for arrival in scenario(5, SHAPE).arrivals]
    reference = reference_streams(checkpoint, requests)
    async with fleet(checkpoint, instances=3) as service:
        async with service.client() as client:
            streams = [asyncio.create_task(collect(client, request)) for request in requests]
            await asyncio.sleep(0.3)
            await service.notice("i0", 2.0)
            await service.wait_event(lambda event: event.kind == "instance_dismissed")
            await service.kill("i1")
            await service.wait_event(lambda event: event.kind == "instance_lost")
            await service.kill_controller()
            await service.restart_controller()
            await service.add(1)
            async with asyncio.timeout(90):
                delivered = await asyncio.gather(*streams)
        info = await service.wait_serving()
        kinds = {event.kind for event in service.events}
    assert all(not compare(reference[one.request_id], got) for one, got in zip(requests, delivered, strict=True))
    assert sorted(item.instance for item in info.instances) == ["i2", "i3"]
    assert kinds >= {"notice", "instance_dismissed", "instance_lost", "controller_started", "layout"}
    assert not service.alive()


@pytest.mark.slow
async def test_a_crowd_uses_the_time_of_a_notice(checkpoint: str, tmp_path: Path) -> None:
    shape = Shape(requests=20, prompt_tokens=(4, 40), output_tokens=(290, 310))  # also where steps take 2 ms
    requests = [arrival.request for arrival in scenario(5, shape).arrivals]
    reference = reference_streams(checkpoint, requests)
    plan = tmp_path / "plan.json"
    plan.write_bytes(given_plans(read_spec(checkpoint), {1: "1x1x1", 2: "2x1x1"}).to_bytes())
    async with fleet(checkpoint, instances=2, plan=plan) as service, service.client() as client:
        streams = [asyncio.create_task(collect(client, request)) for request in requests]
        await asyncio.sleep(0.3)
        await service.notice("i0", 2.5)
        gone = await service.wait_event(lambda event: event.kind == "instance_dismissed")
        async with asyncio.timeout(90):
            delivered = await asyncio.gather(*streams)
        layout = [event for event in service.events if event.kind == "layout"][-1]
    assert all(not compare(reference[one.request_id], got) for one, got in zip(requests, delivered, strict=True))
    assert "reconfiguration_holding" in {event.kind for event in service.events}
    assert layout.data["seconds"]["hold"] > 0.5
    assert gone.time_s > layout.time_s


@pytest.mark.slow
async def test_requests_drain_to_where_their_copies_are(checkpoint: str) -> None:
    """The spare keeps the copies, and takes the replica over: only what was not copied yet travels."""
    shape = replace(SHAPE, output_tokens=(400, 450))  # on a quick machine, too, they run when the notice comes
    requests = [arrival.request for arrival in scenario(5, shape).arrivals]
    reference = reference_streams(checkpoint, requests)
    plan = given_plans(read_spec(checkpoint), {1: "1x1x1", 2: "1x1x1"})
    async with fleet(checkpoint, instances=2, plan=plan) as service, service.client() as client:
        streams = [asyncio.create_task(collect(client, request)) for request in requests]
        await asyncio.sleep(0.6)
        info, first = await service.wait_serving(), len(service.events)
        await service.notice(info.positions[0].device.partition("/")[0], 20.0)
        layout = await service.wait_event(lambda event: event.kind == "layout", since=first)
        async with asyncio.timeout(90):
            delivered = await asyncio.gather(*streams)
    assert all(not compare(reference[one.request_id], got) for one, got in zip(requests, delivered, strict=True))
    assert layout.data["mode"] == "planned"
    assert layout.data["requests_moved"] > 0
    moved, token_bytes = layout.data["moved"], 2 * 4 * 4 * 8 * 4  # K and V of 4 layers, 4 heads, 8 floats
    assert moved["kv_kept_tokens"] * token_bytes > moved["kv_bytes"]


@pytest.mark.slow
async def test_an_instance_reads_its_models_weights_once(checkpoint: str) -> None:
    requests = [arrival.request for arrival in scenario(3, SHAPE).arrivals]
    reference, spec = reference_streams(checkpoint, requests), read_spec(checkpoint)
    plan = given_plans(spec, {1: "2x1x1"}, devices_per_instance=2)
    async with fleet(checkpoint, instances=1, devices_per_instance=2, plan=plan) as service, service.client() as client:
        async with asyncio.timeout(90):
            delivered = await asyncio.gather(*(collect(client, request) for request in requests))
        moved = next(event for event in service.events if event.kind == "layout").data["moved"]
    assert all(not compare(reference[one.request_id], got) for one, got in zip(requests, delivered, strict=True))
    assert moved["weights_disk_bytes"] == moved["weights_intra_bytes"] == spec.weight_bytes // spec.dtype_bytes * 4


async def test_a_fleet_that_cannot_start_says_why(checkpoint: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("{")
    with pytest.raises(StartFailed, match="not JSON"):
        async with fleet(checkpoint, instances=1, plan=plan, start_timeout_s=30.0):
            pass


async def test_reference_streams_are_the_same_alone_and_together(checkpoint: str) -> None:
    requests = [
        GenerationRequest(
            request_id=f"r{index}",
            prompt=tuple(range(10, 20 + 7 * index)),
            sampling=Sampling(temperature=0.8 * (index % 2), seed=index),
            limits=Limits(max_tokens=12, ignore_eos=True),
        )
        for index in range(5)
    ]
    counted: list[int] = []
    together = reference_streams(checkpoint, requests, progress=counted.append)
    assert counted[-1] == 5
    assert all(len(tokens) == 12 for tokens in together.values())
    alone = [reference_streams(checkpoint, [request])[request.request_id] for request in requests]
    assert alone == list(together.values())


def test_given_plans_say_what_they_were_told(checkpoint: str) -> None:
    book = given_plans(read_spec(checkpoint), {1: "1x1x1", 3: "1x3x1"})
    chosen = {plan.state.instances: str(plan.config) for plan in book.plans}
    assert chosen == {0: "None", 1: "D1·P1·T1·B8", 2: "None", 3: "D1·P3·T1·B8"}


async def test_what_ignores_its_lifeline_is_found_and_killed(tmp_path: Path) -> None:
    script = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    group = ProcessGroup("stubborn", [sys.executable, "-c", script], tmp_path / "log")
    assert await group.wait(20.0) == 0
    (orphan,) = await gone([group.pid], 0.2)
    assert [process.pid for process in living([group.pid])] == [orphan.pid]
    orphan.kill()
    group.cut_lifeline()
    assert await gone([group.pid], 10.0) == []


async def test_leftovers_are_an_error(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    book = given_plans(read_spec(checkpoint), {1: "1x1x1"})
    sleeper: list[ProcessGroup] = []

    async def leave_something_behind() -> None:
        async with fleet(checkpoint, instances=1, plan=book) as service:
            command = [sys.executable, "-c", "import time; time.sleep(60)"]
            sleeper.append(ProcessGroup("sleeper", command, service.home / "log"))
            service._groups.append(sleeper[0].pid)
            monkeypatch.setattr(service, "close", partial(service.close, grace_s=1.0))

    with pytest.raises(Leftovers, match="outlived the fleet"):
        await leave_something_behind()
    assert await sleeper[0].wait(5.0) is not None
    sleeper[0].cut_lifeline()
