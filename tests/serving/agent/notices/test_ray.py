"""Against a gRPC server with Ray's replies, and against a real Ray where there is one.

`PERENNIAL_RAY` names a `ray` command of an environment of its own: Ray is no dependency of this project.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from serving.agent.notices.base import Notice
from serving.agent.notices.ray import Ray
from serving.api.generated import ray_gcs_pb2 as gcs
from serving.api.generated import ray_gcs_pb2_grpc as services
from tests.serving.agent.notices.listening import listening

OWN, OTHER = b"\x0a" * 28, b"\x0b" * 28
COMMAND = os.environ.get("PERENNIAL_RAY", "")


class Gcs(services.NodeInfoGcsServiceServicer, services.NodeResourceInfoGcsServiceServicer):
    """What Ray 2.60 answers; `test_a_real_ray` holds it against the original."""

    def __init__(self) -> None:
        self.nodes = {OWN: gcs.GcsNodeInfo(node_id=OWN, node_manager_address="127.0.0.1")}
        self.nodes[OTHER] = gcs.GcsNodeInfo(node_id=OTHER, node_manager_address="192.0.2.77")
        self.draining: dict[bytes, int] = {}
        self.fault: grpc.StatusCode | int | None = None
        self.calls = 0

    async def GetAllNodeInfo(self, request: gcs.GetAllNodeInfoRequest, context: grpc.aio.ServicerContext) -> object:  # noqa: N802
        wanted = {one.node_id for one in request.node_selectors} or set(self.nodes)
        return gcs.GetAllNodeInfoReply(
            status={}, node_info_list=[self.nodes[one] for one in wanted if one in self.nodes]
        )

    async def GetDrainingNodes(  # noqa: N802
        self, request: gcs.GetDrainingNodesRequest, context: grpc.aio.ServicerContext
    ) -> object:
        self.calls += 1
        if isinstance(self.fault, grpc.StatusCode):
            await context.abort(self.fault, "a fault")
        if self.fault == 0:
            await asyncio.sleep(30.0)
        nodes = [
            gcs.DrainingNode(node_id=node, draining_deadline_timestamp_ms=ends_ms)
            for node, ends_ms in self.draining.items()
        ]
        return gcs.GetDrainingNodesReply(status=gcs.GcsStatus(code=int(self.fault or 0)), draining_nodes=nodes)


@pytest.fixture
async def server() -> AsyncIterator[tuple[Gcs, str]]:
    one, server = Gcs(), grpc.aio.server()
    services.add_NodeInfoGcsServiceServicer_to_server(one, server)
    services.add_NodeResourceInfoGcsServiceServicer_to_server(one, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield one, f"127.0.0.1:{port}"
    await server.stop(0)


def source(address: str, node: bytes = b"") -> Ray:
    return Ray(address, node.hex(), grace_s=30.0, period_s=0.02, timeout_s=0.3)


def in_ms(seconds: float) -> int:
    return int((time.time() + seconds) * 1000)


async def test_the_drain_of_the_node_of_this_machine_is_a_notice(server: tuple[Gcs, str]) -> None:
    one, address = server
    async with listening(source(address)) as heard:
        one.draining[OTHER] = in_ms(50.0)
        await heard.until(lambda: one.calls >= 3)
        assert heard.signals == []
        one.draining[OWN] = in_ms(60.0)
        await heard.count(1)
        calls = one.calls
        await heard.until(lambda: one.calls >= calls + 3)
    (notice,) = heard.notices
    assert notice.source == "ray"
    assert 58.0 < notice.deadline_s <= 60.0


@pytest.mark.parametrize("deadline_ms", [0, 2**63 - 1])
async def test_a_drain_without_a_deadline_leaves_the_grace(server: tuple[Gcs, str], deadline_ms: int) -> None:
    one, address = server
    one.draining[OTHER] = deadline_ms
    async with listening(source(address, OTHER)) as heard:
        await heard.count(1)
    assert heard.notices == [Notice(30.0, "ray")]


async def test_an_idle_node_is_drained_at_once(server: tuple[Gcs, str]) -> None:
    one, address = server
    async with listening(source(address)) as heard:
        await heard.until(lambda: one.calls >= 2)
        one.nodes[OWN].state = gcs.GcsNodeInfo.DEAD
        one.nodes[OWN].death_info.reason = gcs.NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
        await heard.count(1)
    assert heard.notices == [Notice(30.0, "ray")]


async def test_a_raylet_that_died_and_was_started_again_is_found(server: tuple[Gcs, str]) -> None:
    one, address = server
    async with listening(source(address)) as heard:
        await heard.until(lambda: one.calls >= 2)
        one.nodes[OWN].state = gcs.GcsNodeInfo.DEAD
        one.nodes[OWN].death_info.reason = gcs.NodeDeathInfo.UNEXPECTED_TERMINATION
        again = b"\x0c" * 28
        one.nodes[again] = gcs.GcsNodeInfo(node_id=again, node_manager_address="127.0.0.1")
        one.draining[again] = in_ms(20.0)
        await heard.count(1)


@pytest.mark.parametrize("fault", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE, 17, 0])
async def test_faults_are_outlived_and_logged_once(
    server: tuple[Gcs, str], fault: grpc.StatusCode | int, caplog: pytest.LogCaptureFixture
) -> None:
    one, address = server
    one.fault = fault
    async with listening(source(address)) as heard:
        await heard.until(lambda: one.calls >= 3)
        one.fault = None
        one.draining[OWN] = in_ms(20.0)
        await heard.count(1)
        await heard.until(lambda: "answers again" in caplog.text)
    assert caplog.text.count("no notices from ray") == 1
    assert "Traceback" not in caplog.text


async def test_two_nodes_on_this_machine_must_be_told_apart(
    server: tuple[Gcs, str], caplog: pytest.LogCaptureFixture
) -> None:
    one, address = server
    one.nodes[OTHER].node_manager_address = "127.0.0.1"
    async with listening(source(address)) as heard:
        await heard.until(lambda: "2 live Ray nodes" in caplog.text)


async def test_without_a_cluster_there_are_no_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, server: tuple[Gcs, str]
) -> None:
    one, address = server
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    one.draining[OWN] = in_ms(20.0)
    async with listening(source("")) as heard:
        await heard.until(lambda: "no Ray cluster is known here" in caplog.text)
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)
        await heard.count(1)


class Cluster:
    """A real Ray: a head without work, and nodes that can be drained."""

    def __init__(self, home: Path, port: int) -> None:
        self.address, self._home = f"127.0.0.1:{port}", home
        head = ["--head", "--port", str(port), "--ray-client-server-port", str(port + 1), "--temp-dir", str(home)]
        self._start(*head, "--include-dashboard=false", "--num-cpus", "0")

    def _start(self, *words: str) -> None:
        self._ray("start", *words, "--disable-usage-stats")

    def _ray(self, *words: str) -> None:
        subprocess.run([COMMAND, *words], check=True, capture_output=True, timeout=60)

    async def add(self) -> bytes:
        """Another node on this machine."""
        before = await self._nodes()
        await asyncio.to_thread(self._start, "--address", self.address, "--num-cpus", "1")
        (new,) = await self._nodes() - before
        return new

    async def _nodes(self) -> set[bytes]:
        async with grpc.aio.insecure_channel(self.address) as channel:
            reply = await services.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(gcs.GetAllNodeInfoRequest())
        return {node.node_id for node in reply.node_info_list}

    @asynccontextmanager
    async def work(self) -> AsyncIterator[None]:
        """A task that keeps the one CPU busy."""
        python = str(Path(COMMAND).with_name("python"))
        pipe, nowhere = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        driver = await asyncio.create_subprocess_exec(python, "-c", _WORK, self.address, stdout=pipe, stderr=nowhere)
        try:
            assert driver.stdout is not None
            assert await asyncio.wait_for(driver.stdout.readline(), 60.0) == b"at work\n"
            yield
        finally:
            driver.kill()
            await driver.communicate()

    async def drain(self, node: bytes, seconds: int) -> None:
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        words = ["--address", self.address, "--node-id", node.hex(), "--deadline-remaining-seconds", str(seconds)]
        await asyncio.to_thread(self._ray, "drain-node", *words, *why)

    def end(self) -> None:
        ours = [
            one for one in psutil.process_iter(["cmdline"]) if str(self._home) in " ".join(one.info["cmdline"] or ())
        ]
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(ours, 10.0)


_WORK = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=0)
class Bell:
    def __init__(self): self.rung = False
    def ring(self): self.rung = True
    def is_rung(self): return self.rung

@ray.remote(num_cpus=1, max_retries=0)
def work(bell):
    ray.get(bell.ring.remote())
    time.sleep(120)

bell = Bell.remote()
task = work.remote(bell)
while not ray.get(bell.is_rung.remote()):
    time.sleep(0.1)
print("at work", flush=True)
time.sleep(120)
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    home = Path(tempfile.mkdtemp(prefix="ray"))  # the paths of Ray's sockets must be short
    one: Cluster | None = None
    try:
        one = Cluster(home, 26379)
        yield one
    finally:
        if one is not None:
            one.end()
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(not COMMAND, reason="PERENNIAL_RAY names no ray command")
async def test_a_real_ray(cluster: Cluster) -> None:
    """A busy node drains until its deadline, an idle one is gone at once; both are notices."""
    busy = await cluster.add()
    async with cluster.work(), listening(source(cluster.address, busy)) as heard:
        await cluster.drain(busy, 60)
        await heard.count(1)
        assert 50.0 < heard.notices[0].deadline_s <= 60.0
    idle = await cluster.add()
    async with listening(source(cluster.address, idle)) as heard:
        await asyncio.sleep(0.5)
        assert heard.signals == []
        await cluster.drain(idle, 60)
        await heard.until(lambda: Notice(30.0, "ray") in heard.notices)
