from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from data.layout import Device
from serving import messages as m
from serving.controller.membership import Membership
from serving.engine.checkpoint import create_checkpoint
from serving.settings import ServingSettings, Timeouts, dump
from tests.serving.agent.notices.metadata import AzureMetadata, Ec2, running
from tests.serving.controller.test_membership import Fleet, Log

START_S = 60.0  # a process that imports torch beside others that do
TIMEOUTS = Timeouts(heartbeat_s=0.1, lease_s=5.0, retry_s=0.1, join_s=START_S, controller_gone_s=10.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    create_checkpoint(str(path), family="llama", layers=2, hidden=32, heads=2, kv_heads=2, ffn=64, vocab=300)
    return path


@pytest.fixture
def settings(tmp_path: Path, checkpoint: Path) -> ServingSettings:
    return ServingSettings(checkpoint=str(checkpoint), journal="", token="token", timeouts=TIMEOUTS)


@asynccontextmanager
async def membership(settings: ServingSettings) -> AsyncIterator[Fleet]:
    log = Log()
    one = Membership(settings, log)
    fleet = Fleet(one, log, await one.start())
    try:
        yield fleet
    finally:
        await one.stop()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def agent(
    tmp_path: Path, settings: ServingSettings, port: int, *options: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A real agent; it and all its children are gone afterwards."""
    path = tmp_path / "settings.json"
    path.write_bytes(dump(settings))
    command = ["--settings", str(path), "--instance", "a", "--type", "local-cpu", "--lifeline", *options]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "serving.agent", *command, "--controller", f"127.0.0.1:{port}"),
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    children: list[psutil.Process] = []
    try:
        yield process
        if process.returncode is None:
            children = psutil.Process(process.pid).children()
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.communicate()
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, 5.0)
        assert not alive


async def test_the_life_of_an_agent(tmp_path: Path, settings: ServingSettings) -> None:
    """Joining, a worker that dies and comes back, a lost connection, notices from both sources, the dismissal."""
    notice = tmp_path / "notice"
    async with (
        membership(settings) as fleet,
        agent(tmp_path, settings, fleet.port, "--notices", f"file:{notice}", "--grace-s", "7") as process,
    ):
        await fleet.until(lambda: ("joined", "a") in fleet.log.said, within_s=START_S)
        instance = fleet.membership.instances["a"]
        (worker,) = psutil.Process(process.pid).children()
        assert instance.workers[0].pid == worker.pid

        assert instance.agent is not None
        worker.suspend()
        instance.agent.connection.send(m.KillWorker(0))
        await fleet.heard("worker lost", "a/0")
        await fleet.until(lambda: bool(fleet.membership.usable_devices()), within_s=START_S)
        worker = psutil.Process(fleet.membership.instances["a"].workers[0].pid)

        notice.write_text("40.0")
        await fleet.heard_notice("file", 40.0)
        instance.agent.connection.abort()
        await fleet.heard("lost", "a")
        await fleet.until(lambda: [one.complete for one in fleet.membership.instances.values()] == [True])
        assert fleet.membership.instances["a"].workers[0].pid == worker.pid  # it outlived the connection
        assert fleet.membership.usable_devices() == ()  # the notice was told again
        process.send_signal(signal.SIGTERM)
        await fleet.heard_notice("sigterm", 7.0)
        fleet.membership.dismiss("a")
        assert await asyncio.wait_for(process.wait(), 10.0) == 0
        await asyncio.to_thread(worker.wait, 5.0)


async def test_a_worker_that_is_stopped_is_replaced(tmp_path: Path, settings: ServingSettings) -> None:
    async with membership(settings) as fleet, agent(tmp_path, settings, fleet.port):
        await fleet.until(lambda: ("joined", "a") in fleet.log.said, within_s=START_S)
        worker = psutil.Process(fleet.membership.instances["a"].workers[0].pid)
        worker.suspend()
        await fleet.heard("worker lost", "a/0")
        assert fleet.log.reasons == ["is stopped"]
        await fleet.until(lambda: bool(fleet.membership.usable_devices()), within_s=START_S)
        assert fleet.membership.instances["a"].workers[0].pid != worker.pid


async def test_an_agent_goes_first_and_its_workers_do_not(tmp_path: Path, settings: ServingSettings) -> None:
    async with membership(settings) as fleet, agent(tmp_path, settings, fleet.port) as process:
        await fleet.until(lambda: bool(fleet.membership.usable_devices()), within_s=START_S)
        own, worker = os.getpriority(os.PRIO_PROCESS, 0), fleet.membership.instances["a"].workers[0].pid
        raised = os.getpriority(os.PRIO_PROCESS, process.pid)
        assert raised == (-10 if _may_go_first() else own)
        assert os.getpriority(os.PRIO_PROCESS, worker) == max(own, 0)


def _may_go_first() -> bool:
    tried = subprocess.run([sys.executable, "-c", "import os; os.setpriority(0, 0, -10)"], capture_output=True)
    return tried.returncode == 0


async def test_a_notice_given_to_a_controller_outlives_it(tmp_path: Path, settings: ServingSettings) -> None:
    async with membership(settings) as fleet, agent(tmp_path, settings, fleet.port):
        await fleet.until(lambda: bool(fleet.membership.usable_devices()), within_s=START_S)
        fleet.membership.notice("a", 40.0, "api")
        await fleet.membership.stop()
        async with membership(msgspec.structs.replace(settings, control_port=fleet.port)) as restarted:
            await restarted.until(lambda: ("joined", "a") in restarted.log.said, within_s=START_S)
            await restarted.heard_notice("api", 40.0)
            assert restarted.membership.usable_devices() == ()
            assert [entry[0] for entry in restarted.log.said].count("noticed") == 1


async def test_a_worker_that_cannot_start_says_why(tmp_path: Path, settings: ServingSettings, checkpoint: Path) -> None:
    broken = tmp_path / "half"
    shutil.copytree(checkpoint, broken)
    os.truncate(broken / "model.safetensors", 1000)
    spoilt = msgspec.structs.replace(settings, checkpoint=str(broken))
    async with membership(spoilt) as fleet, agent(tmp_path, spoilt, fleet.port) as process:
        assert process.stderr is not None
        sentence = await asyncio.wait_for(process.stderr.readline(), 20.0)
        assert b"is not a complete safetensors file" in sentence
        assert b"ended with code 1" in await asyncio.wait_for(process.stderr.readline(), 5.0)
        assert fleet.membership.usable_devices() == ()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--controller", "nowhere"], "'nowhere' is not an address"),
        (["--controller", "127.0.0.1:1", "--devices", "0"], "at least one device"),
        (["--controller", "127.0.0.1:1", "--notices", "oracle"], "'oracle' is no source of notices"),
        (["--controller", "127.0.0.1:1"], "no controller answers at 127.0.0.1:1; giving up"),
    ],
)
def test_an_agent_that_cannot_serve_says_why(
    tmp_path: Path, settings: ServingSettings, options: list[str], sentence: str
) -> None:
    path = tmp_path / "settings.json"
    quick = msgspec.structs.replace(settings, timeouts=msgspec.structs.replace(TIMEOUTS, controller_gone_s=0.5))
    path.write_bytes(dump(quick))
    command = [sys.executable, "-m", "serving.agent", "--settings", str(path), "--instance", "a", "--type", "t"]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert sentence in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


async def test_an_advice_is_repeated_and_the_instance_stays(tmp_path: Path, settings: ServingSettings) -> None:
    ec2 = Ec2()
    ec2.rebalance = True
    async with (
        running(ec2),
        membership(settings) as fleet,
        agent(tmp_path, settings, fleet.port, "--notices", f"aws={ec2.url}"),
    ):
        await fleet.until(lambda: ("advised", "a", "aws") in fleet.log.said, within_s=START_S)
        await fleet.until(lambda: bool(fleet.membership.usable_devices()), within_s=START_S)
        assert fleet.membership.advised_devices() == {Device("a", 0)}
        instance = fleet.membership.instances["a"]
        assert instance.agent is not None
        instance.agent.connection.abort()
        await fleet.heard("lost", "a")
        await fleet.until(lambda: fleet.membership.advised_devices() == {Device("a", 0)})
        assert [entry[0] for entry in fleet.log.said].count("advised") == 2


async def test_a_dismissed_instance_lets_azure_go_ahead(tmp_path: Path, settings: ServingSettings) -> None:
    imds = AzureMetadata()
    async with (
        running(imds),
        membership(settings) as fleet,
        agent(tmp_path, settings, fleet.port, "--notices", f"azure={imds.url}") as process,
    ):
        await fleet.until(lambda: bool(fleet.membership.usable_devices()), within_s=START_S)
        (worker,) = psutil.Process(process.pid).children()
        imds.schedule(60.0)
        await fleet.heard_notice("azure", 60.0)
        assert imds.acknowledged == []
        fleet.membership.dismiss("a")
        await fleet.until(lambda: imds.acknowledged == ["e-1"])
        assert not worker.is_running()
        assert await asyncio.wait_for(process.wait(), 10.0) == 0
