"""The real fleet logic, and peers that speak the workers' protocol and answer otherwise where they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tokenizers import Tokenizer

from data.layout import Device
from data.models import ModelSpec
from data.plan import PlanBook
from data.shared_plan import SharedPlanBook
from serving import messages as m
from serving.controller.events import EventLog
from serving.controller.fleet import Fleet
from serving.controller.journal import Journal
from serving.controller.ledger import Ledger
from serving.controller.records import Record
from serving.requests import GenerationRequest
from serving.settings import ServingSettings, Timeouts
from serving.telemetry import Metrics
from serving.transport import Connection, join
from tests.serving.live import plan_book

Answer = Callable[["Peer", m.Downward], bool]  # whether it dealt with the order


class Peer:
    """An instance with one device: answers every order as a worker would, unless `answer` does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.heard: list[m.Downward] = []
        self.answer: Answer = lambda peer, order: False
        self.agent: Connection[m.Downward]
        self.worker: Connection[m.Downward]
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self, port: int) -> None:
        hellos = (m.AgentHello("t", self.name, "local-cpu", 1, 1), m.WorkerHello("t", self.name, 0, 2))
        self.agent, self.worker = [
            await join(f"127.0.0.1:{port}", hello, frame_bytes=1 << 20, timeout_s=2.0, silence_s=9.0)
            for hello in hellos
        ]
        self._tasks = [asyncio.create_task(self._work()), asyncio.create_task(self._beat())]

    async def _beat(self) -> None:
        while True:
            for connection in (self.agent, self.worker):
                connection.send(m.Heartbeat())
            await asyncio.sleep(0.05)

    async def _work(self) -> None:
        async for order in self.worker:
            self.heard.append(order)
            if not self.answer(self, order):
                self.obey(order)

    def obey(self, order: m.Downward) -> None:
        match order:
            case m.Prepare(epoch=epoch):
                self.worker.send(m.Prepared(epoch, 0, 0, 0))
            case m.Pause(replica=replica):
                self.worker.send(m.Paused(replica, []))
            case m.Snapshot(epoch=epoch, replica=replica):
                self.worker.send(m.Residents(epoch, replica, []))
            case m.Survey(epoch=epoch):
                self.worker.send(m.Holdings(epoch, []))
            case m.Copy(epoch=epoch):
                self.worker.send(m.Copied(epoch, 0))
            case m.Switch(epoch=epoch):
                self.worker.send(m.Switched(epoch, 0))

    def all_heard(self, kind: type[m.Message]) -> list[m.Downward]:
        return [order for order in self.heard if isinstance(order, kind)]

    def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        for connection in (self.agent, self.worker):
            connection.abort()


class Scene:
    """A fleet whose every state has a plan: one replica over all instances, as shards or, at two, as stages."""

    def __init__(self, fleet: Fleet, port: int, ledger: Ledger, events: EventLog) -> None:
        self.fleet, self.port, self.ledger, self.events = fleet, port, ledger, events
        self.peers: dict[str, Peer] = {}

    async def add(self, *names: str, answer: Answer | None = None) -> None:
        for name in names:
            peer = self.peers[name] = Peer(name)
            if answer is not None:
                peer.answer = answer
            await peer.join(self.port)

    async def until(self, condition: Callable[[], bool], within_s: float = 5.0) -> None:
        async with asyncio.timeout(within_s):
            while not condition():  # noqa: ASYNC110 - anything may be waited for
                await asyncio.sleep(0.005)

    async def layout(self, *names: str) -> None:
        """Wait until one replica over exactly these instances is in force."""
        await self.until(lambda: {device.instance for device in self.devices()} == set(names))

    def devices(self) -> list[Device]:
        return [device for one in self.fleet.dispatcher.replicas.values() for device in one.devices]

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events._events]

    async def request(self, name: str = "r", model: str = "") -> Record:
        record = await self.ledger.admit(GenerationRequest(request_id=name, prompt=(1, 2, 3), model=model))
        self.fleet.dispatcher.enqueue(record)
        self.fleet.dispatch()
        return record


@asynccontextmanager
async def opened(
    path: Path,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    *,
    expected: int,
    pause_s: float = 5.0,
    book: PlanBook | SharedPlanBook | None = None,
) -> AsyncIterator[Scene]:
    """A scene of one model, or of those that `book` has."""
    timeouts = Timeouts(gather_s=3.0, settle_s=0.01, retry_s=0.01, pause_s=pause_s, switch_s=5.0, prepare_s=5.0)
    settings = ServingSettings(checkpoint="", journal="", token="t", timeouts=timeouts, expected_instances=expected)
    book = book or plan_book(spec, {1: (1, 1, 1), 2: (1, 2, 1)})
    specs = {one.name: one for one in book.models} if isinstance(book, SharedPlanBook) else {"": spec}
    journal, events = Journal(str(path / "journal")), EventLog()
    ledger = Ledger(journal, dict.fromkeys(specs, tokenizer), Metrics(), finished_kept=10)
    fleet = Fleet(settings, specs, book, journal=journal, ledger=ledger, events=events, metrics=Metrics())
    scene = Scene(fleet, await fleet.start(), ledger, events)
    try:
        yield scene
    finally:
        for peer in scene.peers.values():
            peer.leave()
        await fleet.stop()
        ledger.stop()
        await asyncio.sleep(0.02)
        journal.close()
