"""A real fleet of processes for tests: a controller, agents, and everything that can happen to them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

from data.cluster import ClusterSpec, ClusterState, InstanceType
from data.explanation import Estimate
from data.layout import ParallelConfig
from data.models import ModelSpec
from data.plan import Objective, Plan, PlanBook
from perennial.ports import free_port
from serving.api.client import Client
from serving.engine.checkpoint import create_checkpoint
from serving.requests import Event, Limits, Sampling, ServerInfo
from serving.settings import Capacity, EngineSettings, ServingSettings, Timeouts, dump

QUICK = Timeouts(
    heartbeat_s=0.1,
    lease_s=2.0,
    gather_s=20.0,
    prepare_s=10.0,
    pause_s=5.0,
    switch_s=5.0,
    collective_s=5.0,
    retry_s=0.1,
    controller_gone_s=20.0,
    orphan_s=20.0,
)


def plan_book(spec: ModelSpec, configs: dict[int, tuple[int, int, int]]) -> PlanBook:
    """Plans by number of instances of one device: replicas, stages, shards."""
    kind = InstanceType("local-cpu", 1, "cpu", 1 << 30, 1e9, 1e9, 1.0, 0.3, 5.0)
    plans = [Plan(ClusterState.of({}), None, None, "nothing is left")]
    for count, degrees in configs.items():
        state = ClusterState.of({"local-cpu": count})
        plans.append(Plan(state, ParallelConfig(*degrees, 4), Estimate(1.0, 1.0, 1000), "for a test"))
    cluster = ClusterSpec("local", (kind,), (max(configs),))
    return PlanBook(spec, cluster, Objective(1.0, 64, 64), "test", "0" * 64, tuple(plans))


class LiveFleet:
    """Processes that serve from `home`; each in its own session, ended by `end`."""

    def __init__(
        self, home: Path, configs: dict[int, tuple[int, int, int]], *, instances: int, journal: Path | None = None
    ) -> None:
        self.home = home
        self.spec = create_checkpoint(
            str(home / "checkpoint"),
            family="llama",
            seed=1,
            layers=4,
            hidden=64,
            heads=4,
            kv_heads=2,
            ffn=128,
            vocab=300,
            max_positions=1024,
        )
        self.plan = home / "plan.json"
        self.plan.write_bytes(plan_book(self.spec, configs).to_bytes())
        self.settings = ServingSettings(
            checkpoint=str(home / "checkpoint"),
            journal=str(journal or home / "journal"),
            token="right",
            grpc_port=free_port(),
            control_port=free_port(),
            expected_instances=instances,
            plan=str(self.plan),
            ready_file=str(home / "ready.json"),
            timeouts=QUICK,
            capacity=Capacity(),
            engine=EngineSettings(block_tokens=8, step_tokens=64),
        )
        (home / "settings.json").write_bytes(dump(self.settings))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._names = 0

    # -- processes ------------------------------------------------------------------------------------

    def start_controller(self) -> None:
        self._spawn("controller", "serving.controller", "--settings", str(self.home / "settings.json"))

    def add(self, **changes: str) -> str:
        """Start another instance, whose settings may differ from the controller's; returns its name."""
        name, self._names = f"i{self._names}", self._names + 1
        settings = self.home / f"{name}.json"
        settings.write_bytes(dump(msgspec.structs.replace(self.settings, **changes)))
        controller = f"127.0.0.1:{self.settings.control_port}"
        options = ["--instance", name, "--type", "local-cpu", "--controller", controller]
        self._spawn(name, "serving.agent", "--settings", str(settings), *options)
        return name

    def _spawn(self, name: str, *module: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PERENNIAL_LOG": "INFO"}
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", *module, "--lifeline"],
                env=environment,
                stdin=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        """SIGKILL everything of an instance, or the controller."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        self._reap(process)

    def forget(self, name: str, within_s: float = 15.0) -> int:
        """The exit code of a process that is to end by itself."""
        process = self.processes.pop(name)
        process.wait(within_s)
        return self._reap(process)

    def _reap(self, process: subprocess.Popen[bytes]) -> int:
        if process.stdin is not None:
            process.stdin.close()
        return process.wait(10.0)

    def worker(self, name: str) -> psutil.Process:
        (only,) = psutil.Process(self.processes[name].pid).children()
        return only

    def end(self) -> list[psutil.Process]:
        """Cut every lifeline; returns the processes that outlived it (and ends them)."""
        groups = {process.pid for process in self.processes.values()}
        for process in self.processes.values():
            if process.stdin is not None:
                process.stdin.close()
        end = time.monotonic() + 10.0
        while (left := _living(groups)) and time.monotonic() < end:
            time.sleep(0.05)
        for one in left:
            one.kill()
        for process in self.processes.values():
            process.wait(5.0)
        return left

    # -- clients --------------------------------------------------------------------------------------

    def client(self, give_up_s: float = 40.0) -> Client:
        return Client(f"127.0.0.1:{self.settings.grpc_port}", give_up_s=give_up_s)

    async def until(self, condition: Callable[[ServerInfo], bool], within_s: float = 40.0) -> ServerInfo:
        """Wait for a state of the service."""
        end, info = time.monotonic() + within_s, None
        async with self.client() as client:
            while time.monotonic() < end:
                try:
                    info = await client.server_info()
                except Exception:  # noqa: BLE001 - it may be starting
                    await asyncio.sleep(0.1)
                    continue
                if condition(info):
                    return info
                await asyncio.sleep(0.03)
        raise AssertionError(f"it did not come to be: {info}\n{self.log('controller')[-3000:]}")

    async def ready(self, instances: int) -> ServerInfo:
        """Bring the fleet to so many instances that all serve under one layout."""
        alive = [name for name, process in self.processes.items() if name != "controller" and process.poll() is None]
        for _ in range(instances - len(alive)):
            self.add()
        async with self.client() as client:
            for name in alive[instances:]:
                await client.notify(name, 20.0)
        return await self.until(lambda info: _settled(info, instances))

    async def events(self, since: int = 0) -> list[Event]:
        """All events so far."""
        found: list[Event] = []
        async with self.client() as client:
            stream = client.watch_events(since)
            try:
                while True:
                    found.append(await asyncio.wait_for(anext(stream), 0.3))
            except TimeoutError:
                return found
            finally:
                await stream.aclose()


def _living(groups: set[int]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _settled(info: ServerInfo, instances: int) -> bool:
    ready = {one.instance for one in info.instances if one.state == "ready"}
    busy = {position.device.partition("/")[0] for position in info.positions}
    return info.state == "serving" and len(ready) == len(info.instances) == instances and busy <= ready and bool(busy)


async def tokens_of(client: Client, number: int, run: str, count: int = 200) -> list[int]:
    """One stream: the same for every run, greedy for even numbers, sampled for odd ones."""
    prompt: Sequence[int] = [(number * 7 + at) % 290 + 4 for at in range(20 + number)]
    sampling = Sampling(temperature=0.8 * (number % 2), seed=number)
    limits = Limits(max_tokens=count, ignore_eos=True)
    found: list[int] = []
    async for chunk in client.stream(prompt, sampling=sampling, limits=limits, request_id=f"{run}-{number}"):
        found += chunk.token_ids
    return found


def read_ready(fleet: LiveFleet) -> dict[str, object]:
    """What the controller announced."""
    return dict(json.loads((fleet.home / "ready.json").read_text()))
