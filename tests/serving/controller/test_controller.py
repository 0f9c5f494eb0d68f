from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from data.deployment import Hosted, SharedGroup
from data.layout import Device, ParallelConfig
from data.models import ModelSpec
from perennial.testing import given_groups
from serving.controller.controller import Controller
from serving.controller.dispatch import Replica
from serving.errors import Aborted, DeadlineExceeded, PerennialError, PlanMismatch, QueueFull
from serving.requests import GenerationRequest
from serving.settings import Capacity, ServingSettings, Timeouts, dump, load
from tests.serving.live import plan_book


@pytest.fixture
def settings(tmp_path: Path, checkpoint: Path, spec: ModelSpec) -> ServingSettings:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    plan = tmp_path / "plan.json"
    plan.write_bytes(plan_book(spec, {1: (1, 1, 1)}).to_bytes())
    timeouts = Timeouts(gather_s=0.2, orphan_s=0.2)
    return ServingSettings(
        checkpoint=str(model), journal=str(tmp_path / "journal"), token="t", plan=str(plan), timeouts=timeouts
    )


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def edit(path: Path, before: bytes, after: bytes) -> None:
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after, 1))


Damage = Callable[[ServingSettings], object]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no checkpoint": (lambda s: shutil.rmtree(s.checkpoint), "is not a directory"),
    "no weights": (lambda s: (Path(s.checkpoint) / "model.safetensors").unlink(), "has no model.safetensors"),
    "half the weights": (lambda s: truncate(Path(s.checkpoint) / "model.safetensors"), "not a complete safetensors"),
    "half the tokenizer": (lambda s: truncate(Path(s.checkpoint) / "tokenizer.json"), "is not a tokenizer"),
    "half the config": (lambda s: truncate(Path(s.checkpoint) / "config.json"), "not readable JSON"),
    "another config": (
        lambda s: edit(Path(s.checkpoint) / "config.json", b'"intermediate_size": 64', b'"intermediate_size": 32'),
        "has shape",
    ),
    "unknown model": (
        lambda s: edit(Path(s.checkpoint) / "config.json", b"LlamaForCausalLM", b"MambaForCausalLM"),
        "Mamba",
    ),
    "no plan": (lambda s: Path(s.plan).unlink(), "cannot read the plan book"),
    "half a plan": (lambda s: truncate(Path(s.plan)), "plan book"),
    "an edited plan": (lambda s: edit(Path(s.plan), b"for a test", b"for a jest"), "checksum|sha256|damaged|altered"),
    "a newer plan": (lambda s: edit(Path(s.plan), b'"schema_version":2', b'"schema_version":9'), "newer"),
    "no journal": (lambda s: Path(s.journal).write_bytes(bytes(8192)), "not a usable journal"),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_what_is_damaged_is_named_in_one_sentence(settings: ServingSettings, damage: str) -> None:
    spoil, sentence = DAMAGES[damage]
    spoil(settings)
    with pytest.raises(PerennialError, match=sentence) as caught:
        await Controller.open(settings)
    assert "\n" not in str(caught.value)


async def test_a_host_that_nobody_can_reach(settings: ServingSettings) -> None:
    with pytest.raises(PerennialError, match=r"give an address, not 0\.0\.0\.0"):
        await Controller.open(msgspec.structs.replace(settings, host="0.0.0.0"))


async def test_a_plan_for_another_model(settings: ServingSettings, spec: ModelSpec, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(plan_book(replace(spec, layers=9), {1: (1, 1, 1)}).to_bytes())
    with pytest.raises(PerennialError, match="layers differs from the checkpoint's; plan again"):
        await Controller.open(settings)


def test_a_process_that_cannot_start_says_why_and_nothing_else(settings: ServingSettings, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = tmp_path / "settings.json"
        path.write_bytes(dump(msgspec.structs.replace(settings, control_port=port)))
        command = [sys.executable, "-m", "serving.controller", "--settings", str(path)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"cannot listen for agents on 127.0.0.1:{port} ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "are not valid"),
        (b'{"token": 1}', "are not valid"),
        (None, "cannot read"),
        (b'{"token": "", "journal": ""}', "either one checkpoint or several"),
        (b'{"token": "", "journal": "", "checkpoint": "a", "checkpoints": {"b": "b"}}', "either one checkpoint or"),
        (b'{"token": "", "journal": "", "checkpoint": "a", "capacity": {"admission": "x"}}', "choose queue or slo"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PerennialError, match=sentence):
        load(str(path))


async def test_without_a_fleet_requests_are_refused_and_old_ones_given_up_in_time(settings: ServingSettings) -> None:
    controller, _ = await Controller.open(settings)
    try:
        request = GenerationRequest(request_id="r", prompt=(1, 2), resumable=True)
        stream = await controller.submit(request)
        waiting = asyncio.ensure_future(anext(stream))
        async with asyncio.timeout(5.0):
            while controller.info().state != "no_capacity":  # noqa: ASYNC110 - seen as a client sees it
                await asyncio.sleep(0.01)
        with pytest.raises(PerennialError, match="no plan fits"):
            await controller.submit(GenerationRequest(request_id="other", prompt=(1, 2)))
        assert controller.info().waiting == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        attached = controller.attach("r", 0)
        assert controller.info().waiting == 1
        again = asyncio.ensure_future(anext(attached))
        await asyncio.sleep(0.4)
        assert not again.done()  # somebody listens
        again.cancel()
        await asyncio.sleep(0.5)
        assert controller.info().waiting == 0  # nobody does
        with pytest.raises(Aborted):
            await anext(controller.attach("r", 0))
        assert await controller.drain(1.0) == 0
    finally:
        await controller.close()


async def test_a_deadline_is_kept_while_the_request_waits(settings: ServingSettings) -> None:
    controller, _ = await Controller.open(settings)
    try:
        stream = await controller.submit(GenerationRequest(request_id="r", prompt=(1, 2), deadline_s=0.1))
        with pytest.raises(DeadlineExceeded, match="after 0 tokens"):
            await asyncio.wait_for(anext(stream), 2.0)
        assert controller.info().waiting == 0
    finally:
        await controller.close()


async def test_a_restart_goes_on_where_the_journal_ends(settings: ServingSettings) -> None:
    calm = msgspec.structs.replace(settings, timeouts=Timeouts(gather_s=5.0))
    controller, _ = await Controller.open(calm)
    stream = await controller.submit(GenerationRequest(request_id="r", prompt=(1, 2), resumable=True))
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await controller.close()
    waiting.cancel()
    again, _ = await Controller.open(calm)
    try:
        assert again.info().waiting == 1
        assert await again.abort("r")
        assert not await again.abort("r")
    finally:
        await again.close()


@pytest.mark.parametrize(
    ("admission", "deadline_s", "refused"), [("slo", 1.0, True), ("slo", 3.0, False), ("queue", 1.0, False)]
)
async def test_what_no_replica_can_serve_in_time_is_refused_if_that_is_wanted(
    settings: ServingSettings, admission: str, deadline_s: float, refused: bool
) -> None:
    capacity = Capacity(admission=admission)
    controller, _ = await Controller.open(msgspec.structs.replace(settings, capacity=capacity))
    controller.fleet.dispatcher.replicas[1] = Replica(1, 1, ParallelConfig(1, 1, 1, 4), (Device("i", 0),), 8)
    request = GenerationRequest(request_id="r", prompt=(1, 2), deadline_s=deadline_s)  # 128 steps of 1/64 s
    try:
        if not refused:
            await (await controller.submit(request)).aclose()
            return
        with pytest.raises(QueueFull, match=r"within 1 s, it would take 2 s; try again later") as refusal:
            await controller.submit(request)
        assert refusal.value.retry_after_s == pytest.approx(1.0, abs=0.01)
        assert controller.info().waiting == 0
    finally:
        controller.fleet.dispatcher.replicas.clear()
        await controller.close()


async def test_a_book_of_other_models_is_refused(settings: ServingSettings, spec: ModelSpec, tmp_path: Path) -> None:
    several = msgspec.structs.replace(settings, checkpoint="", checkpoints={"a": settings.checkpoint})
    with pytest.raises(PlanMismatch, match="the plan book is for tiny, and the service has a; plan again"):
        await Controller.open(several)
    book = given_groups(several.checkpoints, {1: [SharedGroup(1, 1, (Hosted("a", 4),))]})
    (tmp_path / "plan.json").write_bytes(book.to_bytes())
    controller, _ = await Controller.open(several)
    assert [(one.name, one.replicas) for one in controller.info().models] == [("a", 0)]
    await controller.close()
    with pytest.raises(PlanMismatch, match="is for a, and the service has"):
        await Controller.open(settings)


async def test_requests_of_a_model_that_is_not_served_any_more_end(settings: ServingSettings, tmp_path: Path) -> None:
    calm = msgspec.structs.replace(settings, timeouts=Timeouts(gather_s=5.0))
    controller, _ = await Controller.open(calm)
    stream = await controller.submit(GenerationRequest(request_id="r", prompt=(1,), resumable=True, model=""))
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await controller.close()
    waiting.cancel()
    book = given_groups({"a": calm.checkpoint}, {1: [SharedGroup(1, 1, (Hosted("a", 4),))]})
    (tmp_path / "plan.json").write_bytes(book.to_bytes())
    again, _ = await Controller.open(msgspec.structs.replace(calm, checkpoint="", checkpoints={"a": calm.checkpoint}))
    try:
        with pytest.raises(Aborted, match="is not served any more"):
            await asyncio.wait_for(anext(again.attach("r", 0)), 5.0)
    finally:
        await again.close()
