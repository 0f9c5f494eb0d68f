"""The agent of one instance."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from serving import messages as m
from serving.agent.environment import worker_environment
from serving.agent.notices.base import Advice, Source, SourceFailed, watch
from serving.agent.standstill import StandstillWatch
from serving.errors import PerennialError
from serving.settings import ServingSettings
from serving.transport import Connection, join

logger = logging.getLogger(__name__)

_LONGEST_RETRY_S = 5.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this agent is and where its controller listens; `grace_s` is the notice that SIGTERM gives.

    Instances of one `zone` are likelier to go together than others; "" if nobody told.
    """

    instance: str
    type: str
    devices: int
    controller: str
    settings_file: str
    grace_s: float = 30.0
    zone: str = ""


class Dismissed(PerennialError):
    """The controller needs this instance no longer."""


class Agent:
    """Keeps one worker process per device alive and reports what happens to the instance."""

    def __init__(self, identity: Identity, settings: ServingSettings, sources: Sequence[Source] = ()) -> None:
        self._identity, self._settings, self._sources = identity, settings, sources
        self._workers: dict[int, asyncio.subprocess.Process] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._connection: Connection[m.Downward] | None = None
        self._notice: tuple[float, str] | None = None  # (loop time of the end, source)
        self._advice: list[str] = []  # sources

    async def start(self) -> None:
        """Start the workers and watch the notice sources."""
        self._keepers = [asyncio.create_task(self._keep(index)) for index in range(self._identity.devices)]
        self._keepers += [asyncio.create_task(self._watch(source)) for source in self._sources]

    async def _watch(self, source: Source) -> None:
        async for signal in watch(source):
            if isinstance(signal, Advice):
                self.advise(signal.source)
            else:
                self.notice(signal.deadline_s, signal.source)

    def notice(self, deadline_s: float, source: str) -> None:
        """The instance will be gone in `deadline_s` seconds; a sooner end replaces a later one."""
        if self._remember(deadline_s, source):
            self._tell_notice()

    def advise(self, source: str) -> None:
        """The instance is likelier to go than others; it stays."""
        if source not in self._advice:
            self._advice.append(source)
            self._tell_advice(source)

    def _tell_advice(self, source: str) -> None:
        if self._connection is not None:
            self._connection.send(m.Advice(self._identity.instance, source))

    def _remember(self, deadline_s: float, source: str) -> bool:
        """Keep a notice, to repeat it at every connection; False if one with a sooner end is there."""
        ends_at = asyncio.get_running_loop().time() + deadline_s
        if self._notice is not None and self._notice[0] <= ends_at:
            return False
        self._notice = (ends_at, source)
        return True

    def _tell_notice(self) -> None:
        notice = self._left()
        if notice is not None and self._connection is not None:
            self._connection.send(notice)

    def _left(self) -> m.Notice | None:
        """The notice in force, by the time that is left of it."""
        if self._notice is None:
            return None
        ends_at, source = self._notice
        return m.Notice(self._identity.instance, max(0.0, ends_at - asyncio.get_running_loop().time()), source)

    def _hello(self) -> m.AgentHello:
        """What is known of the instance's end goes with it: nobody may count on the instance for a moment."""
        one = self._identity
        known = (self._left(), tuple(self._advice))
        return m.AgentHello(self._settings.token, one.instance, one.type, one.devices, os.getpid(), one.zone, *known)

    async def serve(self) -> None:
        """Obey the controller until the connection ends.

        Raises `Dismissed` when told to leave, `JoinRefused` or `TransportError` if there is no connection.
        """
        timeouts = self._settings.timeouts
        notice, hello = self._notice, self._hello()
        connection = await join(
            self._identity.controller,
            hello,
            frame_bytes=self._settings.capacity.frame_bytes,
            timeout_s=timeouts.join_s,
            silence_s=timeouts.controller_gone_s,
            unacknowledged_s=timeouts.unacknowledged_s,
        )
        self._connection = connection
        for source in self._advice[len(hello.advice) :]:  # heard since the hello was written
            self._tell_advice(source)
        if self._notice != notice:
            self._tell_notice()
        beat = asyncio.create_task(self._beat(connection))
        try:
            async for message in connection:
                self._obey(message)
        finally:
            beat.cancel()
            self._connection = None
            await connection.close()

    def _obey(self, message: m.Downward) -> None:
        if isinstance(message, m.Dismiss):
            raise Dismissed("dismissed")
        if isinstance(message, m.Notice):
            self._remember(message.deadline_s, message.source)
        if isinstance(message, m.KillWorker) and message.index in self._workers:
            with contextlib.suppress(ProcessLookupError):
                self._workers[message.index].kill()

    async def _beat(self, connection: Connection[m.Downward]) -> None:
        watch = StandstillWatch()
        while True:
            connection.send(m.Heartbeat())
            running = {index: one.pid for index, one in self._workers.items() if one.returncode is None}
            for index, pid, reason in watch.look(running):
                connection.send(m.WorkerStalled(self._identity.instance, index, pid, reason))
            await asyncio.sleep(self._settings.timeouts.agent_heartbeat_s)

    async def _keep(self, index: int) -> None:
        """Run worker `index`, and run it again when it ends: later and later if it does not live long."""
        clock, timeouts = asyncio.get_running_loop().time, self._settings.timeouts
        failures = 0
        while True:
            started = clock()
            await self._run(index)
            failures = 0 if clock() - started > timeouts.join_s else failures + 1
            await asyncio.sleep(min(timeouts.retry_s * 2 ** min(failures, 10), _LONGEST_RETRY_S))

    async def _run(self, index: int) -> None:
        try:
            process = self._workers[index] = await self._spawn(index)
        except OSError as error:
            logger.error("worker %s/%d cannot be started: %s", self._identity.instance, index, error)
            return
        code = await process.wait()
        logger.warning("worker %s/%d ended with code %d", self._identity.instance, index, code)
        if self._connection is not None:
            self._connection.send(m.WorkerExited(self._identity.instance, index, code))

    async def _spawn(self, index: int) -> asyncio.subprocess.Process:
        identity = self._identity
        command = [sys.executable, "-m", "serving.worker", "--settings", identity.settings_file]
        command += ["--instance", identity.instance, "--index", str(index), "--controller", identity.controller]
        # The pipe is the worker's lifeline: it ends with this process, whatever ends it.
        return await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, env=worker_environment()
        )

    async def stop(self) -> None:
        """Kill the workers and wait for them."""
        for task in self._keepers:
            task.cancel()
        for process in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        for process in self._workers.values():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5.0)

    async def release(self) -> None:
        """Tell the notice sources that nothing is left here; call it after `stop`, before the process ends."""
        for source in self._sources:
            try:
                await source.release()
            except SourceFailed as error:
                logger.warning("%s could not be told that this instance may go: %s", source.name, error)
