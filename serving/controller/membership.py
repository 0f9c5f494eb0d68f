"""Who is here: agents and workers, their connections, and the lease that each renews by speaking."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from typing import Protocol

from data.layout import Device
from serving import messages as m
from serving.controller.leases import looks
from serving.controller.roster import InstanceState, Member, Roster
from serving.errors import InvalidInput, TransportError
from serving.settings import ServingSettings
from serving.transport import Connection, from_below

logger = logging.getLogger(__name__)

_HELLO_BYTES = 4096  # nobody makes the controller buffer more before showing the join token
_PROBE_LOOKS = 3  # an agent's kernel gets something to acknowledge at every third look at its lease


class Listener(Protocol):
    """What membership tells the controller; all calls come from the event loop."""

    def fleet_changed(self) -> None:
        """Instances became ready, or began to leave."""

    def instance_joined(self, instance: InstanceState) -> None:
        """Agent and all workers of an instance are connected."""

    def instance_noticed(self, instance: InstanceState, deadline_s: float, source: str) -> None:
        """An instance announced its end."""

    def instance_advised(self, instance: InstanceState, source: str) -> None:
        """An instance may have to go, without a deadline; it stays usable."""

    def instance_lost(self, instance: InstanceState, reason: str) -> None:
        """An instance is gone without having been dismissed, or after it."""

    def worker_lost(self, device: Device, reason: str) -> None:
        """A worker's process or connection is gone."""

    def worker_said(self, device: Device, message: m.Upward) -> None:
        """A worker sent something that is not membership's business."""


class Membership(Roster):
    """Accepts control connections, checks tokens, keeps leases."""

    def __init__(self, settings: ServingSettings, listener: Listener) -> None:
        super().__init__(settings.timeouts)
        self._settings, self._listener = settings, listener
        self._server: asyncio.Server | None = None
        self._lease_tasks: list[asyncio.Task[None]] = []
        self._connections: set[Connection[m.Upward]] = set()

    async def start(self) -> int:
        """Listen; returns the bound port. Raises `InvalidInput` if the address cannot be had."""
        host, port = self._settings.host, self._settings.control_port
        try:
            self._server = await asyncio.start_server(self._accept, host, port)
        except OSError as error:
            raise InvalidInput(
                f"cannot listen for agents on {host}:{port} ({error.strerror}); choose another control port"
            ) from error
        self._lease_tasks = [asyncio.create_task(watch()) for watch in (self._watch_agents, self._watch_workers)]
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Close every connection and stop listening."""
        for task in self._lease_tasks:
            task.cancel()
        if self._server:
            self._server.close()
        await asyncio.gather(*(connection.close() for connection in self._connections))

    # -- changes ----------------------------------------------------------------------------------

    def notice(self, name: str, deadline_s: float, source: str) -> bool:
        """Mark an instance as leaving; False if it is unknown. A sooner end replaces a later one."""
        instance = self.instances.get(name)
        if instance is None:
            return False
        if instance.agent is not None:
            # It repeats the notice at every connection: this one may be lost, and so may this process.
            instance.agent.connection.send(m.Notice(name, deadline_s, source))
        self._leave(instance, deadline_s, source)
        return True

    def _leave(self, instance: InstanceState, deadline_s: float, source: str) -> None:
        leaving_at = asyncio.get_running_loop().time() + deadline_s
        if instance.leaving_at is None or leaving_at < instance.leaving_at:
            instance.leaving_at = leaving_at
            self._listener.instance_noticed(instance, deadline_s, source)
            self._listener.fleet_changed()

    def dismiss(self, name: str) -> None:
        """Tell an instance to go; one without an agent cannot be told."""
        instance = self.instances[name]
        if instance.agent is not None:
            instance.dismissed = True
            instance.agent.connection.send(m.Dismiss())

    def end_worker(self, device: Device, reason: str) -> None:
        """Have a worker that does nothing any more killed by its agent; it is lost at once."""
        instance = self.instances.get(device.instance)
        member = self.worker(device)
        if instance is None or member is None or member.connection.closed:
            return
        logger.warning("worker %s %s; ending it", device, reason)
        if instance.agent is not None:
            instance.agent.connection.send(m.KillWorker(device.index))
        member.verdict = reason
        member.connection.abort()

    # -- connections --------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = from_below(reader, writer, self._settings.capacity.frame_bytes)
        self._connections.add(connection)
        try:
            hello = await asyncio.wait_for(connection.receive(_HELLO_BYTES), self._settings.timeouts.join_s)
            if isinstance(hello, m.AgentHello | m.WorkerHello):
                await self._welcome(connection, hello)
        except (TransportError, TimeoutError) as error:
            logger.warning("a connection from %s ended before its hello: %s", connection.host, error)
        finally:
            self._connections.discard(connection)
            await connection.close()

    async def _welcome(self, connection: Connection[m.Upward], hello: m.AgentHello | m.WorkerHello) -> None:
        refusal = self._refusal(hello, connection.host)
        if refusal:
            logger.warning("refused %s from %s: %s", hello.instance, connection.host, refusal)
            connection.send(m.Rejected(refusal))
            return
        await self._supersede(hello)
        connection.send(m.Welcome())
        member = Member(connection, hello.pid, hello.kv_address if isinstance(hello, m.WorkerHello) else "")
        try:
            if isinstance(hello, m.AgentHello):
                connection.expect_acknowledgement(self._settings.timeouts.unacknowledged_s)
                await self._serve_agent(hello, member)
            else:
                await self._serve_worker(Device(hello.instance, hello.index), member)
        finally:
            member.gone.set()

    def _refusal(self, hello: m.AgentHello | m.WorkerHello, host: str) -> str:
        if not hmac.compare_digest(hello.token.encode(), self._settings.token.encode()):
            return "wrong join token; take the one of this controller"
        if isinstance(hello, m.WorkerHello):
            return ""
        if hello.devices < 1:
            return "an instance needs at least one device"
        present = self._present(hello)
        if present is not None and (present.pid, present.connection.host) != (hello.pid, host):
            return f"an instance named {hello.instance} is here already; choose another name"
        return ""

    def _present(self, hello: m.AgentHello | m.WorkerHello) -> Member | None:
        instance = self.instances.get(hello.instance)
        if instance is None:
            return None
        return instance.agent if isinstance(hello, m.AgentHello) else instance.workers.get(hello.index)

    async def _supersede(self, hello: m.AgentHello | m.WorkerHello) -> None:
        """Whoever says hello again has lost its old connection: first come all consequences of that."""
        while (present := self._present(hello)) is not None:
            present.connection.abort()
            await asyncio.wait_for(present.gone.wait(), self._settings.timeouts.join_s)

    def _instance(self, name: str) -> InstanceState:
        return self.instances.setdefault(name, InstanceState(name, "", 0))

    async def _serve_agent(self, hello: m.AgentHello, member: Member) -> None:
        instance = self._instance(hello.instance)
        instance.type, instance.devices, instance.agent = hello.type, hello.devices, member
        instance.zone = hello.zone
        reason = "its connection was dropped"
        try:
            self._foretell(instance, hello)
            self._announce(instance)
            reason = await self._listen(member, lambda message: self._agent_said(instance, message), answer=False)
        finally:
            del self.instances[hello.instance]
            for worker in instance.workers.values():
                worker.connection.abort()
            self._listener.instance_lost(instance, reason)
            self._listener.fleet_changed()

    def _foretell(self, instance: InstanceState, hello: m.AgentHello) -> None:
        """What its agent has heard of the end of an instance, before anybody counts on it."""
        if hello.notice is not None:
            self._leave(instance, hello.notice.deadline_s, hello.notice.source)
        for source in hello.advice:
            self._advise(instance, source)

    def _advise(self, instance: InstanceState, source: str) -> None:
        if not instance.advised:
            instance.advised = True
            self._listener.instance_advised(instance, source)
            self._listener.fleet_changed()

    def _agent_said(self, instance: InstanceState, message: m.Upward) -> None:
        if isinstance(message, m.Notice):
            self._leave(instance, message.deadline_s, message.source)
        elif isinstance(message, m.Advice):
            self._advise(instance, message.source)
        elif isinstance(message, m.WorkerExited):
            logger.warning("worker %s/%d ended with code %d", instance.name, message.index, message.code)
        elif isinstance(message, m.WorkerStalled):
            worker = instance.workers.get(message.index)
            if worker is not None and worker.pid == message.pid:
                self.end_worker(Device(instance.name, message.index), message.reason)

    async def _serve_worker(self, device: Device, member: Member) -> None:
        instance = self._instance(device.instance)
        instance.workers[device.index] = member
        reason = "its connection was dropped"
        try:
            self._announce(instance)
            reason = await self._listen(
                member, lambda message: self._listener.worker_said(device, message), answer=True
            )
        finally:
            del instance.workers[device.index]
            if instance.agent is None and not instance.workers:
                self.instances.pop(instance.name, None)
            self._listener.worker_lost(device, reason)
            self._listener.fleet_changed()

    async def _listen(self, member: Member, hear: Callable[[m.Upward], None], *, answer: bool) -> str:
        """Take messages until the connection ends; returns why it did. Heartbeats are answered if `answer`."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                message = await member.connection.receive()
            except TransportError as error:
                return member.verdict or str(error)
            member.lease.renew()
            if isinstance(message, m.Heartbeat):
                member.pulse, member.pulse_at = message, loop.time()
                if answer:
                    member.connection.send(m.Alive())
                if not message.still_s:
                    continue
            hear(message)

    def _announce(self, instance: InstanceState) -> None:
        if instance.complete and not instance.announced:
            instance.announced = True
            self._listener.instance_joined(instance)
        if instance.complete:
            self._listener.fleet_changed()

    async def _watch_agents(self) -> None:
        lease_s = self._settings.timeouts.agent_lease_s
        async for look in looks(lease_s):
            for instance in list(self.instances.values()):
                agent = instance.agent
                if agent is None or agent.connection.closed:
                    continue
                if agent.lease.look():
                    logger.warning("instance %s is silent; counting it as lost", instance.name)
                    agent.verdict = f"it was silent for {lease_s:g} s"
                    agent.connection.abort()
                elif look % _PROBE_LOOKS == 0:
                    agent.connection.send(m.Alive())

    async def _watch_workers(self) -> None:
        lease_s = self._settings.timeouts.lease_s
        async for _ in looks(lease_s):
            for instance in list(self.instances.values()):
                for index, worker in list(instance.workers.items()):
                    if not worker.connection.closed and worker.lease.look():
                        self.end_worker(Device(instance.name, index), f"was silent for {lease_s:g} s")
