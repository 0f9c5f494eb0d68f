"""A fleet from what the Kubernetes files say, as processes of this machine: registry, plan, service, agents."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from perennial.processes import ProcessGroup
from serving.api.client import Client
from serving.engine.checkpoint import create_checkpoint
from serving.errors import PerennialError
from serving.requests import Limits
from tests.infra.manifests import containers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

KILLED_S = 10.0
BINARIES = Path(sys.executable).parent
FIELDS = {"POD_IP": "127.0.0.1", "ZONE": "here"}


class Machine:
    """Runs containers as processes: paths, addresses and sizes are those of this machine."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ports = {number: free_port() for number in (5000, 50051, 50052, 9090)}
        self.changes = {
            "/checkpoints/model": str(home / "model"),
            "/profiles/model": str(home / "profile"),
            "/etc/perennial/join-token": str(home / "join-token"),
            "sqlite:////data/mlflow.db": f"sqlite:///{home / 'mlflow.db'}",
            "--artifacts-destination=/data/artifacts": f"--artifacts-destination={home / 'artifacts'}",
            "perennial-registry:5000": f"localhost:{self.ports[5000]}",
            "perennial-control:50052": f"127.0.0.1:{self.ports[50052]}",
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--device=cuda": "--device=cpu",
            "p4d.24xlarge": "local-cpu",
            "--devices=8": "--devices=1",
            "--budget=120": "--budget=3",
            "--instances=8": "--instances=2",
            "--input-tokens=512": "--input-tokens=16",
            "--output-tokens=128": "--output-tokens=16",
            "--max-batch=32": "--max-batch=4",
            **{f"port={number}": f"port={port}" for number, port in self.ports.items()},
        }

    def command(self, name: str, **fields: str) -> list[str]:
        container = containers()[name]
        words = container.get("command") or ["perennial", *container["args"]]
        return [str(BINARIES / words[0]), *(self._here(word, FIELDS | fields) for word in words[1:])]

    def _here(self, word: str, fields: Mapping[str, str]) -> str:
        for name, value in fields.items():
            word = word.replace(f"$({name})", value)
        for there, here in self.changes.items():
            word = word.replace(there, here)
        return word

    def environment(self, name: str) -> dict[str, str]:
        told = {one["name"]: one["value"] for one in containers()[name].get("env", ()) if "value" in one}
        registry = {key: self._here(value, {}) for key, value in told.items() if key == "PERENNIAL_REGISTRY"}
        return {**registry, "PERENNIAL_HOME": str(self.home / f"home-{name}")}

    def run(self, name: str) -> None:
        environment = {**os.environ, **self.environment(name)}
        done = subprocess.run(
            self.command(name), env=environment, cwd=self.home, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @contextmanager
    def start(self, name: str, **fields: str) -> Iterator[ProcessGroup]:
        log = self.home / f"{fields.get('POD_NAME', name)}.log"
        group = ProcessGroup(log.stem, self.command(name, **fields), log, environment=self.environment(name))
        try:
            yield group
        finally:
            group.signal(signal.SIGKILL)
            group.cut_lifeline()
            end = time.monotonic() + KILLED_S
            while group.alive and time.monotonic() < end:
                time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    create_checkpoint(str(tmp_path / "model"), family="llama", layers=4, hidden=64, ffn=128)
    (tmp_path / "join-token").write_text("from-a-secret\n")
    return Machine(tmp_path)


async def until_listening(port: int, group: ProcessGroup) -> None:
    end = time.monotonic() + 90.0
    while time.monotonic() < end:
        assert group.alive, group.tail(30)
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
            continue
        writer.close()
        await writer.wait_closed()
        return
    raise AssertionError(f"nothing listens: {group.tail(30)}")


async def test_a_fleet_from_the_manifests_serves_and_leaves_in_peace(machine: Machine) -> None:
    with machine.start("mlflow") as registry:
        await until_listening(machine.ports[5000], registry)
        await asyncio.to_thread(machine.run, "profile")
        await asyncio.to_thread(machine.run, "plan")
        with (
            machine.start("controller") as controller,
            machine.start("agent", POD_NAME="pod-a") as first,
            machine.start("agent", POD_NAME="pod-b") as second,
        ):
            await until_listening(machine.ports[50051], controller)
            async with Client(f"127.0.0.1:{machine.ports[50051]}") as client:
                running = asyncio.create_task(client.generate("hello", limits=Limits(max_tokens=150, ignore_eos=True)))
                await until_two_are_there(client)
                first.signal_leader(signal.SIGTERM)  # what Kubernetes does to a pod that has to go
                assert await first.wait(60.0) == 0
                assert len((await asyncio.wait_for(running, 60.0)).token_ids) == 150
                (left,) = (await client.server_info()).instances
                assert (left.instance, left.zone) == ("pod-b", "here")
            controller.signal_leader(signal.SIGTERM)
            assert await controller.wait(60.0) == 0
            with machine.start("controller") as successor:
                await until_listening(machine.ports[50051], successor)
                async with Client(f"127.0.0.1:{machine.ports[50051]}") as client:
                    answer = await client.generate("again", limits=Limits(max_tokens=5, ignore_eos=True))
                    assert len(answer.token_ids) == 5
                    assert [one.instance for one in (await client.server_info()).instances] == ["pod-b"]
                assert second.alive


async def until_two_are_there(client: Client) -> None:
    async with asyncio.timeout(90.0):
        while True:
            try:
                if len((await client.server_info()).instances) == 2:
                    return
            except PerennialError:
                pass  # it is on its way
            await asyncio.sleep(0.1)
