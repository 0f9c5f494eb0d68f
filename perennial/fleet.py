"""A whole service on this machine: a controller and instances that are real processes.

Used by `perennial serve` and `perennial demo`, and by tests through `perennial.testing`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from perennial.feed import EventFeed
from perennial.network import Host
from perennial.ports import free_port
from perennial.processes import ProcessGroup, Start, gone, living, python_module, start_command
from serving import settings as serving_settings
from serving.api.client import Client
from serving.errors import PerennialError, Retryable, TransportError
from serving.requests import Event, ServerInfo
from serving.settings import ServingSettings

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_CALM_S = 0.3  # longer than the controller waits before it begins or retries a change
_KILL_WAIT_S = 10.0


class StartFailed(PerennialError):
    """A process of the fleet ended before it was ready."""


@dataclass(slots=True)
class Instance:
    """One instance of the fleet; `leaving` once it was given notice, `suspended` while it is stopped."""

    name: str
    group: ProcessGroup
    gpus: tuple[int, ...] = ()
    leaving: bool = False
    suspended: bool = False


class Fleet:
    """The processes of one service, and what can be done to them.

    `settings` need fixed ports (`with_ports`): instances find the controller by them, also after it
    was restarted. Everything is written below `home`. On CUDA every instance has GPUs of its own,
    unless `gpus` are given: then instances share those, each new one taking the least used.
    """

    def __init__(
        self,
        settings: ServingSettings,
        *,
        home: str | Path,
        instance_type: str = "local-cpu",
        devices_per_instance: int = 1,
        gpus: Sequence[int] = (),
        start: Start = start_command,
    ) -> None:
        self._start_process = start
        self.settings, self.home, self.instance_type = settings, Path(home).absolute(), instance_type
        self.devices_per_instance, self._gpus = devices_per_instance, tuple(gpus)
        self.instances: dict[str, Instance] = {}
        self._feed = EventFeed()
        self.controller: ProcessGroup | None = None
        self._groups: list[int] = []
        self._born = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._client: Client | None = None

    # -- starting -------------------------------------------------------------------------------

    async def start(self, instances: int, *, timeout_s: float = 120.0) -> None:
        """Start the controller and the instances, and wait until their layout is in force.

        Without instances of its own, wait until the controller listens.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        self._settings_file.touch(0o600)
        self._settings_file.write_bytes(serving_settings.dump(self.settings))
        self._start_controller()
        self._client = self.client()
        self._keep(self._feed.collect(self._client))
        self.launch(instances)
        if instances:
            await self.wait_serving(timeout_s=timeout_s)
        else:
            await self._wait_ready(timeout_s)

    def _withdraw(self) -> None:
        """What the ready file says is not true any more."""
        Path(self.settings.ready_file).unlink(missing_ok=True)

    def _start_controller(self) -> None:
        self._withdraw()
        command = python_module("serving.controller", "--settings", str(self._settings_file), "--lifeline")
        self.controller = self._spawn("controller", command)

    def launch(self, count: int = 1, *, notices: str = "") -> list[str]:
        """Start instances and return their names at once; they join when they are up.

        `notices` are their notice sources, such as `aws=http://127.0.0.1:8080` (docs/notices.md).
        """
        return [self._launch_one(notices) for _ in range(count)]

    def launch_at(self, host: Host) -> str:
        """Start an instance on a host of its own and return its name at once."""
        return self._launch_one("", host)

    def _launch_one(self, notices: str, host: Host | None = None) -> str:
        name = f"i{self._born}"
        gpus = self._choose_gpus() if self.settings.engine.device == "cuda" else ()
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}
        file = self._settings_at(host, name) if host else self._settings_file
        command = python_module("serving.agent", "--settings", str(file), "--lifeline")
        command = [*host.enter, *command] if host else command
        command += ["--instance", name, "--type", self.instance_type, "--devices", str(self.devices_per_instance)]
        command += ["--controller", f"{self.settings.host}:{self.settings.control_port}", "--notices", notices]
        self._born += 1
        self.instances[name] = Instance(name, self._spawn(name, command, visible), gpus)
        return name

    def _choose_gpus(self) -> tuple[int, ...]:
        """The GPUs that fewest live instances of this fleet have, as many as an instance has devices."""
        users = Counter(gpu for instance in self.instances.values() for gpu in instance.gpus)
        choice = self._gpus or range(len(users) + self.devices_per_instance)
        return tuple(sorted(choice, key=lambda gpu: (users[gpu], gpu))[: self.devices_per_instance])

    def _settings_at(self, host: Host, name: str) -> Path:
        """The settings as a machine needs them whose address is not the controller's."""
        path = self.home / f"{name}.json"
        path.touch(0o600)
        path.write_bytes(serving_settings.dump(msgspec.structs.replace(self.settings, host=host.address)))
        return path

    def _spawn(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> ProcessGroup:
        root = Path(__file__).resolve().parent.parent
        paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        group = ProcessGroup(
            name,
            command,
            self.home / "logs" / f"{name}.log",
            environment={"PYTHONPATH": paths, **(environment or {})},
            start=self._start_process,
        )
        self._groups.append(group.pid)
        return group

    @property
    def _settings_file(self) -> Path:
        return self.home / "serving.json"

    # -- observing ------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where the gRPC API listens."""
        return f"{self.settings.host}:{self.settings.grpc_port}"

    def client(self, *, give_up_s: float = 120.0) -> Client:
        """A new client of this service; close it when done."""
        return Client(self.address, give_up_s=give_up_s)

    async def info(self) -> ServerInfo | None:
        """What the controller says of itself; None while it cannot be reached."""
        try:
            return await asyncio.wait_for(self._own_client.server_info(), 5.0)
        except (Retryable, TransportError, TimeoutError):
            return None

    async def wait_serving(self, *, timeout_s: float = 60.0) -> ServerInfo:
        """Wait until every live instance has joined and their layout is in force, with no change under way."""
        deadline, calm_since = time.monotonic() + timeout_s, time.monotonic()
        info: ServerInfo | None = None
        while time.monotonic() < deadline:
            self._check_started()
            info = await self.info()
            if info is None or not self._is_settled(info):
                calm_since = time.monotonic()
            elif time.monotonic() - calm_since >= _CALM_S:
                return info
            await asyncio.sleep(_POLL_S)
        raise StartFailed(
            f"the fleet did not settle within {timeout_s:g} s (state {info.state if info else 'unreachable'}); "
            f"see the logs in {self.home / 'logs'}"
        )

    @property
    def events(self) -> list[Event]:
        """Every event so far, over all restarts of the controller."""
        return self._feed.events

    async def wait_event(self, accept: Callable[[Event], bool], *, since: int = 0, timeout_s: float = 30.0) -> Event:
        """The first event from list position `since` on that `accept` likes. Raises `TimeoutError`."""
        return await self._feed.wait(accept, since=since, timeout_s=timeout_s)

    async def _wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while await self.info() is None:
            self._check_started()
            if time.monotonic() > deadline:
                raise StartFailed(f"the controller was not ready within {timeout_s:g} s; see {self.home / 'logs'}")
            await asyncio.sleep(_POLL_S)

    def _is_settled(self, info: ServerInfo) -> bool:
        staying = {name for name, item in self.instances.items() if not item.leaving and not item.suspended}
        ready = {item.instance for item in info.instances if item.state == "ready"}
        known = {item.instance for item in info.instances if item.state in ("ready", "joining", "leaving")}
        return info.state == "serving" and ready == known == staying and self._feed.settled

    def _check_started(self) -> None:
        if self.controller is not None and self.controller.returncode not in (None, -signal.SIGKILL):
            raise StartFailed(_ended("controller", self.controller))
        for name, instance in self.instances.items():
            if instance.group.returncode not in (None, 0, -signal.SIGKILL):
                raise StartFailed(_ended(f"instance {name}", instance.group))

    @property
    def _own_client(self) -> Client:
        if self._client is None:
            raise StartFailed("the fleet has not been started; call start() first")
        return self._client

    # -- what happens to fleets -----------------------------------------------------------------

    async def add(self, count: int = 1, *, notices: str = "", timeout_s: float = 60.0) -> list[str]:
        """Start instances, with these notice sources, and wait until the controller knows them."""
        names = self.launch(count, notices=notices)
        for name in names:
            await self.wait_event(_joined(name), timeout_s=timeout_s)
        return names

    async def notice(self, instance: str, seconds: float, *, then_kill: bool = True) -> None:
        """Announce the end of an instance; at the deadline it is killed if it is still there.

        Returns when the notice is given. The kill happens in the background.
        """
        item = self.instances[instance]
        item.leaving = True
        deadline = time.monotonic() + seconds
        with contextlib.suppress(Retryable, TransportError):
            await self._own_client.notify(instance, seconds, "fleet")
        if then_kill:
            self._keep(self._kill_at(item, deadline))

    async def _kill_at(self, item: Instance, deadline: float) -> None:
        await item.group.wait(max(0.0, deadline - time.monotonic()))
        await self.kill(item.name)

    async def kill(self, instance: str) -> None:
        """End an instance without a word: SIGKILL to its whole process group."""
        item = self.instances.pop(instance, None)
        if item is not None:
            item.group.signal(signal.SIGKILL)
            item.group.cut_lifeline()
            await item.group.wait(_KILL_WAIT_S)

    def suspend(self, instance: str) -> None:
        """Stop every process of an instance: it is silent, and its connections stay open."""
        self.instances[instance].suspended = True
        self.instances[instance].group.signal(signal.SIGSTOP)

    def resume(self, instance: str) -> None:
        """Let a suspended instance run again."""
        self.instances[instance].group.signal(signal.SIGCONT)
        self.instances[instance].suspended = False

    async def kill_controller(self) -> None:
        """End the controller without a word. The instances wait for the next one."""
        if self.controller is not None:
            self.controller.signal(signal.SIGKILL)
            self.controller.cut_lifeline()
            await self.controller.wait(_KILL_WAIT_S)

    async def restart_controller(self) -> None:
        """Start the controller again, on the same addresses and the same journal."""
        await self.kill_controller()
        self._start_controller()

    async def reap(self) -> list[str]:
        """Forget instances that have ended by themselves (dismissed); returns their names."""
        ended = [name for name, item in self.instances.items() if not item.group.alive]
        for name in ended:
            self.instances.pop(name).group.cut_lifeline()
        return ended

    # -- the end --------------------------------------------------------------------------------

    async def close(self, *, grace_s: float = 10.0) -> list[str]:
        """End every process and wait for it; returns what was still there after `grace_s` and was killed.

        Instances are told by their lifelines, so a process that stays is a process that would have
        outlived its parent.
        """
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for item in self.instances.values():
            item.group.signal(signal.SIGCONT)
            item.group.cut_lifeline()
        if self.controller is not None:
            self.controller.signal_leader(signal.SIGTERM)
            await self.controller.wait(grace_s / 2)
            self.controller.cut_lifeline()
        left = await gone(self._groups, grace_s)
        names = [_describe(process) for process in left]
        for pid in {os.getpgid(process.pid) for process in left if process.is_running()}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        await gone(self._groups, _KILL_WAIT_S)
        await self.reap()
        if self.controller is not None:
            await self.controller.wait(_KILL_WAIT_S)
        self._withdraw()
        if self._client is not None:
            await self._client.close()
        return names

    def alive(self) -> list[psutil.Process]:
        """Every process of the fleet that lives now."""
        return living(self._groups)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def with_ports(settings: ServingSettings) -> ServingSettings:
    """The same settings with every port that is 0 replaced by a free one."""
    ports = {
        name: getattr(settings, name) or free_port(settings.host)
        for name in ("grpc_port", "control_port", "metrics_port")
    }
    return msgspec.structs.replace(settings, **ports)


def read_ready(path: str | os.PathLike[str]) -> dict[str, str]:
    """The addresses that a controller wrote: `grpc`, `control`, `metrics`."""
    return {name: str(value) for name, value in json.loads(Path(path).read_text(encoding="utf-8")).items()}


def _joined(instance: str) -> Callable[[Event], bool]:
    return lambda event: event.kind == "instance_joined" and event.data.get("instance") == instance


def _ended(what: str, group: ProcessGroup) -> str:
    last = group.tail(1) or f"exit code {group.returncode}"
    return f"the {what} ended before it was ready: {last} (log: {group.log})"


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline()[1:6])}"
    except psutil.NoSuchProcess:
        return str(process.pid)
