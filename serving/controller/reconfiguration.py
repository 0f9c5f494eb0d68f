"""Carries a transition out: prepare in the background, pause, move KV, activate; or fail and say where.

While replicas prepare, everything goes on serving. From the pause on, the retired replicas' requests
are in nobody's hands; if anything fails then, they are replayed from the journal.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from data.layout import Device
from data.models import ModelSpec
from planning.resharding import Box
from planning.transition import Transition, retained
from serving import messages as m
from serving.controller.dispatch import Replica
from serving.controller.orders import Adopted, adopt, kv_blocks, move_orders, prepare_orders, world_of
from serving.controller.phases import Phase, TransitionFailed
from serving.controller.records import Record
from serving.controller.rendezvous import Rendezvous
from serving.settings import ServingSettings

logger = logging.getLogger(__name__)


class Workers(Protocol):
    """The part of membership that a reconfiguration talks through."""

    def send(self, device: Device, message: m.Message) -> None:
        """Send to a worker."""

    def connected(self, device: Device) -> bool:
        """Whether a worker can be spoken to."""


@dataclass(slots=True)
class Outcome:
    """What a reconfiguration did: the replicas it built, the sequences it moved, and what it cost."""

    epoch: int
    new: list[Replica]
    adopted: list[Adopted]
    resident: dict[Device, tuple[Box, ...]]
    moved: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Reconfiguration:
    """One attempt to carry out `transition` as `epoch`. `retired` are the healthy replicas it ends."""

    epoch: int
    transition: Transition
    retired: Sequence[Replica]
    spec: ModelSpec
    settings: ServingSettings
    workers: Workers
    number: Callable[[], int]
    resident: Mapping[Device, tuple[Box, ...]]
    new: list[Replica] = field(default_factory=list)
    world: tuple[Device, ...] = ()
    paused: bool = False
    activated: bool = False  # some may have taken their new roles over
    _failure: str = ""
    _records: dict[int, Record] = field(default_factory=dict)
    _phase: Phase[Any] | None = None
    store: Rendezvous | None = None  # lives as long as the epoch's replicas: NCCL connects lazily

    # -- what the controller hears meanwhile ---------------------------------------------------------

    def heard(self, device: Device, message: m.Upward) -> None:
        """An answer, or a failure, of a participant."""
        if isinstance(message, m.Failed):
            if message.epoch == self.epoch:
                self.fail(f"{device} failed: {message.reason}")
        elif self._phase is not None and self._belongs(message):
            self._phase.answer(device, message)

    def _belongs(self, message: m.Upward) -> bool:
        if isinstance(message, m.Paused):
            return message.replica in {replica.number for replica in self.retired}
        return getattr(message, "epoch", None) == self.epoch

    def lost(self, device: Device, reason: str) -> None:
        """A worker is gone. A participant's loss ends the attempt: its groups are broken."""
        if device in self.world:
            self.fail(f"{device} was lost ({reason})")

    def builds(self, number: int) -> bool:
        """Whether replica `number` is one of the new ones."""
        return any(replica.number == number for replica in self.new)

    def fail(self, reason: str) -> None:
        """End the attempt at once; between two phases, before the next one."""
        self._failure = self._failure or reason
        if self._phase is not None:
            self._phase.fail(reason)

    def cancel(self, reason: str) -> None:
        """The world has changed: give up unless requests are already in the air."""
        if not self.paused:
            self.fail(reason)

    def _check(self, phase: str) -> None:
        if self._failure:
            raise TransitionFailed(f"{phase}: {self._failure}")

    # -- the phases ------------------------------------------------------------------------------------

    async def run(self, on_prepared: Callable[[float], None], on_pause: Callable[[], None]) -> Outcome:
        """All phases in order. Raises `TransitionFailed`; then call `undo`."""
        clock = asyncio.get_running_loop().time
        started = clock()
        self._build()
        prepared = await self._prepare()
        ready = clock()
        on_prepared(ready - started)
        on_pause()
        residents = await self._pause()
        stopped = clock()
        adopted = self._adopt(residents)
        # A request may end while its KV moves; it is adopted all the same, and cancelled afterwards.
        self._records = {one.resident.key: one.source.records[one.resident.key] for one in adopted}
        kv_bytes = await self._move(adopted)
        moved = clock()
        await self._activate(adopted)
        self._check("activate")
        ended = clock()
        seconds = {"prepare": ready - started, "pause": stopped - ready}
        seconds |= {"transfer": moved - stopped, "activate": ended - moved, "total": ended - started}
        return Outcome(self.epoch, self.new, adopted, self._residency(), self._moved(prepared, kv_bytes), seconds)

    def _build(self) -> None:
        config = self.transition.config
        for planned in self.transition.new:
            replica = Replica(self.number(), self.epoch, config, planned.devices, 0)
            replica.kv_blocks = kv_blocks(self.spec, replica, self.settings.engine)
            self.new.append(replica)
        sources = self.retired if self.new else ()
        self.world = world_of(self.transition, self.new, sources)

    async def _ask(
        self, name: str, orders: Mapping[Device, m.Message], timeout_s: float, expected: Iterable[Device] | None = None
    ) -> dict[Device, Any]:
        self._check(name)
        self._phase = Phase(name, orders if expected is None else expected)
        for device, order in orders.items():
            if not self.workers.connected(device):
                raise TransitionFailed(f"{name}: {device} is gone")
            self.workers.send(device, order)
        return await self._phase.wait(timeout_s)

    async def _prepare(self) -> dict[Device, m.Prepared]:
        if not self.world:
            return {}
        timeout_s = self.settings.timeouts.prepare_s
        self.store = Rendezvous(self.settings.host, timeout_s)
        orders = prepare_orders(self.epoch, self.store.address, self.transition, self.new, self.world)
        return await self._ask("prepare", orders, timeout_s)

    async def _pause(self) -> dict[int, Sequence[m.Resident]]:
        self.paused = True
        orders = {replica.leader: m.Pause(replica.number) for replica in self.retired}
        answers = await self._ask("pause", orders, self.settings.timeouts.pause_s)
        return {answer.replica: answer.sequences for answer in answers.values()}

    def _adopt(self, residents: Mapping[int, Sequence[m.Resident]]) -> list[Adopted]:
        heirs = {
            number: replica
            for planned, replica in zip(self.transition.new, self.new, strict=True)
            for number in planned.inherits
        }
        replicas = {replica.number: replica for replica in self.retired}
        known = {
            number: [resident for resident in sequences if resident.key in replicas[number].records]
            for number, sequences in residents.items()
        }
        return adopt(known, heirs, replicas, self.settings.engine.block_tokens)

    async def _move(self, adopted: Sequence[Adopted]) -> int:
        orders = move_orders(self.epoch, self.spec, adopted)
        answers = await self._ask("move", orders, self.settings.timeouts.switch_s)
        return sum(answer.sent_bytes for answer in answers.values())

    async def _activate(self, adopted: Sequence[Adopted]) -> None:
        self.activated = True
        now = asyncio.get_running_loop().time()
        retire = [replica.number for replica in self.retired]
        inherited: dict[Device, list[m.Adoption]] = {}
        for one in adopted:
            record = self._records[one.resident.key]
            adoption = m.Adoption(record.assignment(now), one.resident.cached_tokens, list(one.blocks))
            inherited.setdefault(one.target.leader, []).append(adoption)
        orders = {device: m.Activate(self.epoch, inherited.get(device, []), retire) for device in self.world}
        await self._ask("activate", orders, self.settings.timeouts.switch_s)
        for device in {device for replica in self.retired for device in replica.devices} - set(self.world):
            self.workers.send(device, m.Retire(retire))

    def undo(self) -> None:
        """After a failure: every participant forgets the epoch; replicas that were paused are lost."""
        numbers = [replica.number for replica in self.new]
        if self.paused:
            numbers += [replica.number for replica in self.retired]
        involved = {*self.world, *(device for replica in self.retired for device in replica.devices)}
        for device in involved:
            self.workers.send(device, m.Abandon(self.epoch))
            self.workers.send(device, m.Retire(numbers))
        if self.store is not None:
            self.store.close()

    def _residency(self) -> dict[Device, tuple[Box, ...]]:
        return {
            device: retained(self.resident.get(device, ()), boxes) for device, boxes in self.transition.needed.items()
        }

    def _moved(self, prepared: Mapping[Device, m.Prepared], kv_bytes: int) -> dict[str, int]:
        weights = self.transition.weights
        return {
            "weights_local_bytes": weights.local_bytes,
            "weights_intra_bytes": weights.intra_instance_bytes,
            "weights_inter_bytes": weights.inter_instance_bytes,
            "weights_disk_bytes": sum(answer.disk_bytes for answer in prepared.values()),
            "kv_bytes": kv_bytes,
        }
