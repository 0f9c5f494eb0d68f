"""Carries a transition out: prepare and copy in the background, pause, move the rest, switch; or fail and say where.

While replicas prepare and KV is copied, everything goes on serving. From the pause on, the retired
replicas' requests are in nobody's hands; if anything fails then, their KV is salvaged for the next attempt.
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
from serving.controller.drain import beside, crosses, untouched
from serving.controller.grace import Grace
from serving.controller.moves import Moves
from serving.controller.orders import (
    Heir,
    Source,
    found_sources,
    kv_blocks,
    prepare_orders,
    world_of,
)
from serving.controller.phases import Phase, TransitionFailed
from serving.controller.records import Record
from serving.controller.rendezvous import Rendezvous
from serving.controller.restoring import best_sources, pays
from serving.settings import ServingSettings

logger = logging.getLogger(__name__)

_ROUNDS = 3  # of copying in the background
_LOOK_S = 0.02  # between looks at whether the old layout is still needed
_SHORT_COPY_S = 0.1  # after a copy as quick as this the rest is small


class Workers(Protocol):
    """The part of membership that a reconfiguration talks through."""

    def send(self, device: Device, message: m.Message) -> None:
        """Send to a worker."""

    def connected(self, device: Device) -> bool:
        """Whether a worker can be spoken to."""

    def connected_devices(self) -> tuple[Device, ...]:
        """All workers that can be spoken to."""

    def host(self, device: Device) -> str:
        """The host of a worker."""


@dataclass(slots=True)
class Stranded:
    """A replica that broke: its requests wait for what is left of their KV.

    `copied`: the copy of its KV had been complete, but for what the last steps added.
    """

    number: int
    devices: tuple[Device, ...]
    records: dict[int, Record]
    copied: bool = False
    attempts: int = 0


@dataclass(slots=True)
class Outcome:
    """What a reconfiguration did: the replicas it built, the sequences it moved or restored, and what it cost.

    `restored` are tokens that restored requests have to compute again although they had been delivered;
    `uncopied` those of them whose copy was not complete when they were hit.
    """

    epoch: int
    new: list[Replica]
    heirs: list[Heir]
    resident: dict[Device, tuple[Box, ...]]
    restored: dict[int, int] = field(default_factory=dict)
    uncopied: frozenset[int] = frozenset()
    moved: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def moved_bytes(self) -> dict[str, int]:
        """All that came from elsewhere, by what it is."""
        weights = sum(self.moved[f"weights_{way}_bytes"] for way in ("intra", "inter", "disk"))
        return {"weights": weights, "kv": self.moved["kv_bytes"]}


@dataclass(slots=True)
class Reconfiguration:
    """One attempt to carry out `transition` as `epoch`.

    `retired` are the healthy replicas it ends, `kept` those it leaves alone, `stranded` broken ones whose
    requests may be restored; copies of `former` replicas may help. `unrestorable` is told at once which of
    those have to be replayed.
    """

    epoch: int
    transition: Transition
    retired: Sequence[Replica]
    specs: Mapping[str, ModelSpec]
    settings: ServingSettings
    workers: Workers
    number: Callable[[], int]
    resident: Mapping[Device, tuple[Box, ...]]
    kept: Sequence[Replica] = ()
    stranded: Sequence[Stranded] = ()
    former: Sequence[int] = ()
    tell: Callable[[str], None] = lambda phase: None
    unrestorable: Callable[[Sequence[Record], Stranded], None] = lambda records, stranded: None
    grace: Grace | None = None
    new: list[Replica] = field(default_factory=list)
    world: tuple[Device, ...] = ()
    joined: Sequence[Replica] = ()  # running replicas that sequences are about to join
    paused: bool = False
    activated: bool = False  # some may have taken their new roles over
    _failure: str = ""
    _phase: Phase[Any] | None = None
    _kept_tokens: int = 0  # whose KV came from copies beside where it went
    _moving_s: dict[str, float] = field(default_factory=lambda: {"weights": 0.0, "kv": 0.0})  # the slowest worker's
    store: Rendezvous | None = None  # lives as long as the epoch's replicas: NCCL connects lazily
    _moves: Moves = field(init=False)

    def __post_init__(self) -> None:
        self._moves = Moves(self.specs, self.settings.engine.block_tokens)

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
        if device in self.world or (self._phase is not None and self._phase.expects(device)):
            self.fail(f"{device} was lost ({reason})")

    def builds(self, number: int) -> bool:
        """Whether replica `number` is one of the new ones."""
        return any(replica.number == number for replica in self.new)

    def grafts(self, key: int) -> bool:
        """Whether a sequence may have joined a running replica by now."""
        return self.activated and self._moves.joins(key)

    def forget(self, key: int) -> Record | None:
        """Take a sequence away from the replica it came from; None if that has ended with it."""
        for records in [*(one.records for one in self.retired), *(one.records for one in self.stranded)]:
            if key in records:
                return records.pop(key)
        return None

    def broke(self, replica: Replica, reason: str) -> None:
        """A running replica is no more: its KV is gone, and with it the transfers that were planned."""
        if replica in (*self.retired, *self.joined):
            self.fail(f"replica {replica.number} failed: {reason}")
        self.kept = [one for one in self.kept if one is not replica]

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
        await self._survey()
        prepared = await self._prepare()
        ready = clock()
        on_prepared(ready - started)
        await self._decode_on()
        held = clock()
        copied_bytes = await self._copy_while_serving()
        copied = clock()
        self._check("pause")
        on_pause()
        await self._pause()
        stopped = clock()
        heirs = self._moves.heirs()
        sent_bytes = await self._switch(heirs)
        self._check("switch")
        self._let_go()
        ended = clock()
        seconds = {"prepare": ready - started, "hold": held - ready, "copy": copied - held, "pause": stopped - copied}
        seconds |= {"transfer": ended - stopped, "total": ended - started, **self._moving_s}
        moved = self._moved(prepared, copied_bytes, sent_bytes)
        restored = self._moves.reexecuted(heirs)
        return Outcome(self.epoch, self.new, heirs, self._residency(), restored, self._moves.uncopied, moved, seconds)

    def _build(self) -> None:
        for one in self.transition.new:
            replica = Replica(self.number(), self.epoch, one.config, one.devices, 0, one.model, one.kv_share)
            replica.kv_blocks = kv_blocks(self.specs[one.model], replica, self.settings.engine)
            self.new.append(replica)
            self._moves.offer(replica, one.inherits)

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

    # -- what broken replicas left -----------------------------------------------------------------------

    async def _survey(self) -> None:
        """Find what is left of stranded sequences; those of which nothing is left are given up to replay."""
        if not self.stranded:
            return
        ended = [one.number for one in self.stranded]
        order = m.Survey(self.epoch, list(dict.fromkeys([*ended, *self.former])), ended)
        orders = dict.fromkeys(self.workers.connected_devices(), order)
        answers = await self._ask("survey", orders, self.settings.timeouts.pause_s)
        found = found_sources({device: answer.held for device, answer in answers.items()})
        for stranded in self.stranded:
            lost = []
            for key, record in list(stranded.records.items()):
                spec = self.specs[record.model]
                sources, tokens = best_sources(spec, record, stranded.number, found.get(key, []))
                if tokens and self._hosts(record.model) and pays(spec, self.settings.replication, tokens):
                    self._moves.restore(record, sources, tokens, copied=stranded.copied)
                else:
                    held = [(str(one.device), one.replica, one.tokens) for one in found.get(key, [])]
                    logger.info("request %s is replayed; found of its KV: %s", record.request.request_id, held)
                    lost.append(stranded.records.pop(key))
            self.unrestorable(lost, stranded)

    def _hosts(self, model: str) -> bool:
        """Whether some replica of a model will be there."""
        return any(one.model == model for one in (*self.new, *self.kept))

    # -- in the background -------------------------------------------------------------------------------

    async def _prepare(self) -> dict[Device, m.Prepared]:
        holders, self.joined = self._moves.holders, self._join()
        sources = self.retired if self.new or self.joined else ()
        self.world = world_of(self.transition, [*self.new, *sources, *self.joined], holders)
        if not self.world:
            return {}
        timeout_s = self.settings.timeouts.prepare_s
        self.store = Rendezvous(self.settings.host, timeout_s)
        address, hurry = self.store.address, bool(self.stranded) or (self.grace is not None and self.grace.limited)
        orders = prepare_orders(self.epoch, address, self.transition, self.new, self.world, hurry=hurry)
        prepared = await self._ask("prepare", orders, timeout_s)
        self._clock("weights", prepared)
        return prepared

    def _clock(self, what: str, answers: Mapping[Device, m.Prepared | m.Copied | m.Switched]) -> None:
        self._moving_s[what] += max((answer.transfer_s for answer in answers.values()), default=0.0)

    def _join(self) -> Sequence[Replica]:
        """Running replicas that sequences join because no new one of their model is built for them."""
        waiting = self._moves.models | {one.model for one in self.retired if one.records}
        built = {one.model for one in self.new}
        return [one for one in self.kept if one.model in waiting - built]

    async def _decode_on(self) -> None:
        """Let the old layout go on as long as its room is needed and the notice allows."""
        if self.grace is None or self.stranded:  # broken replicas' requests wait for this change
            return
        if self.grace.waits(self._moving()):
            self.tell("holding")
        while self.grace.waits(self._moving()):
            self._check("hold")
            await asyncio.sleep(_LOOK_S)
        self._moves.left_behind = self.grace.stay_behind(self._moving())

    def _moving(self) -> list[Record]:
        return [record for replica in self.retired for record in replica.records.values()]

    async def _copy_while_serving(self) -> int:
        """Copy what is cached while everyone decodes, until little is left; returns the bytes sent."""
        if not self.world or not (self.retired or self.joined):
            return 0
        self.tell("copying")
        clock = asyncio.get_running_loop().time
        sent = 0
        for number in range(_ROUNDS):
            began = clock()
            self._moves.take_in(self.retired, await self._snapshot())
            await self._reserve()
            if number == 0:
                sent += await self._copy_kept()
            heirs = self._moves.heirs()
            sent += await self._copy(heirs)
            self._moves.arrived(heirs)
            if clock() - began < _SHORT_COPY_S:
                break
        return sent

    async def _snapshot(self) -> list[m.Resident]:
        orders = {replica.leader: m.Snapshot(self.epoch, replica.number) for replica in self.retired}
        answers = await self._ask("snapshot", orders, self.settings.timeouts.pause_s)
        return [one for answer in answers.values() for one in answer.sequences]

    async def _pause(self) -> None:
        self.paused = True
        self.tell("paused")
        orders = {replica.leader: m.Pause(replica.number) for replica in self.retired}
        answers = await self._ask("pause", orders, self.settings.timeouts.pause_s)
        self._moves.take_in(self.retired, [one for answer in answers.values() for one in answer.sequences])

    async def _reserve(self) -> None:
        """Ask running replicas for room, for sequences that have none yet."""
        if not self.joined:
            return
        orders = {leader: m.Reserve(self.epoch, some) for leader, some in self._moves.wanted(self.joined).items()}
        answers = await self._ask("reserve", orders, self.settings.timeouts.pause_s)
        self._moves.reserve(self.joined, [seat for answer in answers.values() for seat in answer.seats])

    async def _copy_kept(self) -> int:
        """What is kept beside where it goes need not come from where it runs; returns the bytes sent for the rest."""
        if not self.settings.replication.enabled:
            return 0
        heirs = self._moves.heirs()
        if self.settings.engine.device != "cpu":  # GPUs of a host read each other's memory, which is quicker
            heirs = [heir for heir in heirs if crosses(heir, self.workers.host)]
        heirs = beside(heirs, await self._kept()) if heirs else []
        if not heirs:
            return 0
        sent = await self._copy(heirs)
        whole = untouched(heirs, await self._kept())
        self._moves.arrived(whole)
        self._kept_tokens = sum(heir.tokens for heir in whole)
        return sent

    async def _kept(self) -> dict[int, list[Source]]:
        """Copies of retired replicas' KV on the devices that it goes to."""
        order = m.Survey(self.epoch, [one.number for one in self.retired])
        targets = {device for one in (*self.new, *self.joined) for device in one.devices}
        answers = await self._ask("survey", dict.fromkeys(targets, order), self.settings.timeouts.pause_s)
        return found_sources({device: answer.held for device, answer in answers.items()})

    async def _copy(self, heirs: Sequence[Heir]) -> int:
        sends, receives = self._moves.pieces(heirs)
        announced = self._moves.announce(heirs, asyncio.get_running_loop().time())
        orders = {
            one: m.Copy(self.epoch, sends.get(one, []), receives.get(one, []), announced.get(one, []))
            for one in sorted({*sends, *receives, *announced})
        }
        answers = await self._ask("copy", orders, self.settings.timeouts.prepare_s)
        self._clock("kv", answers)
        return sum(answer.sent_bytes for answer in answers.values())

    # -- the switch --------------------------------------------------------------------------------------

    async def _switch(self, heirs: Sequence[Heir]) -> int:
        self.activated = True
        now = asyncio.get_running_loop().time()
        retire = [replica.number for replica in self.retired]
        adoptions = self._moves.adoptions(heirs, now)
        sends, receives = self._moves.pieces(heirs)
        orders = {
            device: m.Switch(
                self.epoch, sends.get(device, []), receives.get(device, []), adoptions.get(device, []), retire
            )
            for device in self.world
        }
        answers = await self._ask("switch", orders, self.settings.timeouts.switch_s)
        self._clock("kv", answers)
        return sum(answer.sent_bytes for answer in answers.values())

    def _let_go(self) -> None:
        """Until everybody had switched the caches of retired replicas were kept, in case of a failure."""
        retire = m.Retire([replica.number for replica in self.retired])
        for device in {device for replica in self.retired for device in replica.devices}:
            self.workers.send(device, retire)

    def undo(self) -> None:
        """After a failure: every participant forgets the epoch; the caches of paused replicas are salvaged."""
        involved = {*self.world, *(device for replica in self.retired for device in replica.devices)}
        numbers = [replica.number for replica in self.new]
        for device in involved:
            self.workers.send(device, m.Abandon(self.epoch))
            self.workers.send(device, m.Retire(numbers))
            if self.paused:
                for replica in self.retired:
                    self.workers.send(device, m.Salvage(replica.number))
        for replica in self.joined:  # after the word that nobody is to join any more
            self.workers.send(replica.leader, m.Cancel(replica.number, self._moves.reserved(replica)))
        if self.store is not None:
            self.store.close()

    def _residency(self) -> dict[Device, tuple[Box, ...]]:
        return {
            device: retained(self.resident.get(device, ()), boxes) for device, boxes in self.transition.needed.items()
        }

    def _moved(self, prepared: Mapping[Device, m.Prepared], copied_bytes: int, sent_bytes: int) -> dict[str, int]:
        weights = self.transition.weights
        return {
            "weights_local_bytes": weights.local_bytes,
            "weights_intra_bytes": weights.intra_instance_bytes,
            "weights_inter_bytes": weights.inter_instance_bytes,
            "weights_disk_bytes": sum(answer.disk_bytes for answer in prepared.values()),
            "kv_bytes": copied_bytes + sent_bytes,
            "kv_copied_bytes": copied_bytes,
            "kv_kept_tokens": self._kept_tokens,
        }
