"""Keeps the layout in step with the fleet: one reconfiguration at a time, again until nothing is to change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from data.deployment import Deployment
from data.layout import Device
from data.models import ModelSpec
from data.plan import PlanBook
from data.shared_plan import SharedPlanBook
from planning.resharding import Box
from planning.transition import Transition, common
from serving import messages as m
from serving.controller.copies import Copies
from serving.controller.dispatch import Dispatcher, Replica
from serving.controller.events import EventLog, layout_event
from serving.controller.grace import Grace, timing_of
from serving.controller.journal import Journal
from serving.controller.ledger import Ledger
from serving.controller.membership import Membership
from serving.controller.phases import TransitionFailed
from serving.controller.progress import standstill
from serving.controller.reconfiguration import Outcome, Reconfiguration, Stranded
from serving.controller.records import Record
from serving.controller.recovery import Recovery, lost_with
from serving.controller.rendezvous import Rendezvous
from serving.controller.roster import InstanceState
from serving.controller.targets import Targets
from serving.settings import ServingSettings
from serving.telemetry import Metrics

logger = logging.getLogger(__name__)

_LONGEST_RETRY_S = 5.0
_DOUBLINGS = 10  # of the pause between attempts; more would overflow long before they were waited for
_CUDA_PATIENCE = 5  # times stall_s: kernels and links are loaded at their first use


class Fleet:
    """The replicas that live, and the loop that turns them into what the plan book says."""

    def __init__(
        self,
        settings: ServingSettings,
        specs: Mapping[str, ModelSpec],
        book: PlanBook | SharedPlanBook,
        *,
        journal: Journal,
        ledger: Ledger,
        events: EventLog,
        metrics: Metrics,
    ) -> None:
        self._settings, self._specs, self.book = settings, specs, book
        self._journal, self._ledger, self._events, self._metrics = journal, ledger, events, metrics
        self.membership = Membership(settings, self)
        self.dispatcher = Dispatcher(lambda replica: self._targets.pace(self.book, replica))
        self._targets = Targets(settings, specs, self.membership, self.dispatcher)
        self.epoch = journal.meta("epoch", 0)
        self.target: Deployment | None = None
        self.no_capacity = False
        self._last_number = self.epoch * 1000  # replica numbers stay unique over restarts too
        self._resident: dict[Device, tuple[Box, ...]] = {}
        self._preloading: dict[Device, tuple[Box, ...]] = {}
        self._stores: dict[int, Rendezvous] = {}
        self._current: Reconfiguration | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._early: list[tuple[Device, m.Tokens]] = []  # from replicas that ran before all had said so
        self._early_emissions: list[tuple[int, m.Emission]] = []  # of requests that joined a running replica
        self._copies = Copies(self.membership)
        self._recovery = Recovery(
            self.dispatcher, ledger, metrics, self._copies, most_recoveries=settings.capacity.recoveries
        )
        self._broken = False  # a replica failed since the last layout

    async def start(self) -> int:
        """Listen for agents and begin; returns the control port."""
        port = await self.membership.start()
        self._task = asyncio.create_task(self._reconfigure_forever())
        return port

    async def stop(self) -> None:
        """Stop, and dismiss everyone unless they are to wait for the next controller."""
        if self._task:
            self._task.cancel()
        for name in list(self.membership.instances) if self._settings.dismiss else ():
            self.membership.dismiss(name)
        await self.membership.stop()
        for store in self._stores.values():
            store.close()

    def hosts(self, model: str) -> bool:
        """Whether the layout in force, or one that is still to be found, has a place for a model."""
        return self.target is None or model in self.target.models

    def adopt_book(self, book: PlanBook | SharedPlanBook) -> None:
        """Serve by another plan book from now on."""
        self.book = book
        self.fleet_changed()

    # -- membership's listener ------------------------------------------------------------------------

    def fleet_changed(self) -> None:
        """Look at the fleet again soon."""
        self._changed.set()
        if self._current is not None and self._current.grace is not None:
            self._current.grace.urge()

    def instance_joined(self, instance: InstanceState) -> None:
        """A complete instance."""
        if instance.type not in {kind.name for kind in self.book.cluster.types}:
            logger.warning("the plan book knows no %s: instance %s stays a spare", instance.type, instance.name)
        self._events.emit("instance_joined", instance=instance.name, type=instance.type, devices=instance.devices)

    def instance_noticed(self, instance: InstanceState, deadline_s: float, source: str) -> None:
        """An instance will leave; a preparation that counts on it is void."""
        self._events.emit("notice", instance=instance.name, deadline_s=deadline_s, source=source)
        self._metrics.preemption(source)
        building = self._current.transition.new if self._current else ()
        if self._current and any(device.instance == instance.name for one in building for device in one.devices):
            self._current.cancel(f"{instance.name} is leaving")

    def instance_advised(self, instance: InstanceState, source: str) -> None:
        """An instance may have to go: nothing new is placed there if there is another place."""
        self._events.emit("advice", instance=instance.name, source=source)
        self._metrics.advised(source)
        self.fleet_changed()

    def instance_lost(self, instance: InstanceState, reason: str) -> None:
        """An instance is gone."""
        for index in range(instance.devices):
            self._resident.pop(Device(instance.name, index), None)
        if instance.dismissed:
            self._events.emit("instance_dismissed", instance=instance.name)
            return
        self._events.emit("instance_lost", instance=instance.name, reason=reason)
        self._metrics.preemption("crash")

    def worker_lost(self, device: Device, reason: str) -> None:
        """A worker is gone: its replica is broken, and so is a reconfiguration it takes part in."""
        self._resident.pop(device, None)
        self._preloading.pop(device, None)
        instance = self.membership.instances.get(device.instance)
        if instance is not None and not instance.dismissed:  # otherwise the end of the instance says it
            self._events.emit("worker_lost", device=str(device), reason=reason)
        if self._current is not None:
            self._current.lost(device, reason)
        for replica in list(self.dispatcher.replicas.values()):
            if device in replica.devices:
                self._break(replica, f"{device} was lost")
        self._copies.lost(device)  # only now: whoever broke had its copies until then

    def worker_said(self, device: Device, message: m.Upward) -> None:
        """Tokens go to the ledger, everything else to the reconfiguration under way."""
        if isinstance(message, m.Tokens):
            self._take(device, message)
            return
        if isinstance(message, m.Preloaded):
            self._resident[device] = tuple(message.boxes)
            if self._preloading.get(device) == tuple(message.boxes):
                del self._preloading[device]
            return
        if isinstance(message, m.CopyState):
            self._copies.heard(device, message)
            self._drop_copies()
            return
        if isinstance(message, m.Heartbeat):
            self._examine(message.replica)
            return
        if isinstance(message, m.Failed) and message.phase == "preload":
            self._preloading.pop(device, None)
        if isinstance(message, m.Failed) and message.phase == "step":
            replica = self.dispatcher.replicas.get(message.replica)
            if replica is not None:
                self._break(replica, message.reason)
        if self._current is not None:
            self._current.heard(device, message)

    def _examine(self, number: int) -> None:
        """A worker of a replica says that its step loop stands still: end who is to blame, if anyone is."""
        replica, timeouts = self.dispatcher.replicas.get(number), self._settings.timeouts
        if replica is None:
            return
        limit_s = timeouts.stall_s * (1 if self._settings.engine.device == "cpu" else _CUDA_PATIENCE)
        found = standstill(number, [self.membership.heard(device) for device in replica.devices], limit_s)
        if found is not None and found.rank is not None:
            self.membership.end_worker(replica.devices[found.rank], f"did nothing for {found.still_s:.1f} s")
        elif found is not None:
            self._break(replica, f"its ranks waited for each other for {found.still_s:.1f} s")

    # -- work -----------------------------------------------------------------------------------------

    def _take(self, device: Device, message: m.Tokens) -> None:
        replica = self.dispatcher.replicas.get(message.replica)
        if replica is None:
            if self._current is not None and self._current.builds(message.replica):
                self._early.append((device, message))
            return
        replica.running, replica.waiting, replica.kv_usage = message.running, message.waiting, message.kv_usage
        for key in message.given_up:
            if (record := replica.records.get(key)) is not None:
                record.replayed = len(record.output)
        self._metrics.gave_up(len(message.given_up))
        if not self._absorb(replica, message.emissions):
            return
        number = message.replica
        self._ledger.after_commit(lambda: self.membership.send(device, m.Taken(number, 1)))
        self.dispatch()

    def _absorb(self, replica: Replica, emissions: Sequence[m.Emission]) -> bool:
        """Give emissions to their records; False if one was skipped, which breaks the replica."""
        for emission in emissions:
            record = replica.records.get(emission.key)
            if record is None:
                if self._current is not None and self._current.grafts(emission.key):
                    self._early_emissions.append((replica.number, emission))
                continue
            if not self._ledger.take(record, emission):
                self._break(replica, f"request {record.request.request_id} skipped a token")
                return False
            if record.finish is not None:
                self._let_go(record, told=emission.finish is not None)
        return True

    def _let_go(self, record: Record, *, told: bool) -> None:
        """A record ended; its leader is told unless it said so itself."""
        replica = self.dispatcher.release(record)
        if replica is not None and not told:
            self.membership.send(replica.leader, m.Cancel(replica.number, [record.key]))

    def end(self, record: Record, reason: str) -> None:
        """Abort a record, or let it miss its deadline, wherever it is."""
        self._ledger.end(record, "deadline" if reason == "deadline" else "abort")
        self._let_go(record, told=False)
        self.dispatch()

    def dispatch(self) -> None:
        """Hand queued requests to replicas with room."""
        now = asyncio.get_running_loop().time()
        for number, records in self.dispatcher.assign().items():
            replica = self.dispatcher.replicas[number]
            self.membership.send(replica.leader, m.Submit(number, [record.assignment(now) for record in records]))

    def _break(self, replica: Replica, reason: str) -> None:
        """A replica failed, and with it those that share its devices.

        Their requests wait until it is known what can be restored; survivors keep their KV.
        """
        for one in self.dispatcher.group(replica):
            self._break_alone(one, reason)
        self.dispatch()
        self.fleet_changed()

    def _break_alone(self, replica: Replica, reason: str) -> None:
        if replica.number not in self.dispatcher.replicas:
            return
        requests = [record.request.request_id for record in replica.records.values()]
        number = replica.number
        self._events.emit("replica_failed", epoch=replica.epoch, replica=number, reason=reason, requests=requests)
        if self._current is not None:
            self._current.broke(replica, reason)
        self._broken = True
        self._recovery.strand(replica)
        for device in replica.devices:
            self.membership.send(device, m.Salvage(replica.number))

    def _drop_copies(self) -> None:
        """Let go of copies that have become useless, unless they may be in use just now."""
        if self._current is None and not self._recovery.stranded:
            self._copies.keep(self.dispatcher.replicas.values())

    def _unrestorable(self, records: Sequence[Record], stranded: Stranded) -> None:
        self._recovery.replay(records, lost_with(stranded))
        self.dispatch()

    # -- reconfiguration --------------------------------------------------------------------------------

    async def _reconfigure_forever(self) -> None:
        timeouts = self._settings.timeouts
        await self._gather()
        self.fleet_changed()  # nobody may have come: that has to be said too
        failures = 0
        while True:
            await self._changed.wait()
            await asyncio.sleep(timeouts.settle_s)
            self._changed.clear()
            try:
                await self._step()
                failures = 0
            except Exception as error:  # the loop must outlive whatever one attempt meets
                failures += 1
                if not isinstance(error, TransitionFailed):
                    logger.exception("epoch %d", self.epoch)
                self._events.emit("reconfiguration_failed", epoch=self.epoch, reason=str(error))
                await asyncio.sleep(min(timeouts.retry_s * 2 ** min(failures - 1, _DOUBLINGS), _LONGEST_RETRY_S))
                self.fleet_changed()

    async def _gather(self) -> None:
        """Before the first layout: wait for the expected instances, but not for ever.

        After a restart the fleet is up and only has to reconnect, as far as it still exists.
        """
        clock, timeouts = asyncio.get_running_loop().time, self._settings.timeouts
        until = clock() + (timeouts.regather_s if self.epoch else timeouts.gather_s)
        while clock() < until:
            if sum(one.usable for one in self.membership.instances.values()) >= self._settings.expected_instances:
                return
            await asyncio.sleep(0.02)

    async def _step(self) -> None:
        """One look at the fleet, and what follows from it."""
        target, whole = self._targets.wanted(self.book, self.target), self._targets.whole(self.book, self.target)
        keepers, live, book = self._copies.keepers, set(self.dispatcher.replicas), self.book
        transition = None
        if target is not None:
            transition = await self._targets.transition(target, self._resident, whole=whole, keepers=keepers)
        if book is not self.book or live != set(self.dispatcher.replicas) or not self._can_build(transition):
            return  # what has changed meanwhile asks for another look
        if target is not None and transition is not None:
            if not transition.empty or self._recovery.stranded:
                await self._carry_out(transition, target)
            self.target = target
        elif self.dispatcher.replicas:
            self._forget(self._recovery.settle(self._recovery.stranded))
        if self._settings.replication.enabled:
            self._copies.arrange(self.dispatcher.replicas.values())
        self._report_capacity()
        self._dismiss_idle()
        self._preload_spares()

    def _can_build(self, transition: Transition | None) -> bool:
        """Whether all devices that new replicas are to have may still be used."""
        places = {device for one in transition.new for device in one.devices} if transition else set[Device]()
        return places <= set(self.membership.usable_devices())

    def _preload_spares(self) -> None:
        if self.target is None:
            return
        whole = self._targets.whole(self.book, self.target)
        for device, boxes in self._targets.preloads(self.target, self._resident, whole=whole).items():
            if self._preloading.get(device) == boxes:
                continue  # it is at it
            self._preloading[device] = boxes
            self._resident[device] = common(self._resident.get(device, ()), boxes)  # whether or not it manages
            self.membership.send(device, m.Preload(list(boxes)))

    async def _carry_out(self, transition: Transition, target: Deployment) -> None:
        self.epoch += 1
        retired = [self.dispatcher.replicas[number] for number in transition.retire]
        before = str(self.target) if self.target else ""
        mode = "recovery" if self._broken else "planned"
        self._events.emit("reconfiguration_started", epoch=self.epoch, **{"from": before, "to": str(target)}, mode=mode)
        attempt = Reconfiguration(
            self.epoch,
            transition,
            retired,
            self._specs,
            self._settings,
            self.membership,
            self._number,
            self._resident,
            kept=[self.dispatcher.replicas[number] for number in transition.keep],
            stranded=list(self._recovery.stranded),
            former=self._copies.former,
            tell=lambda phase: self._events.emit(f"reconfiguration_{phase}", epoch=self.epoch),
            unrestorable=self._unrestorable,
            grace=self._grace(retired, target),
        )
        self._current, self._early, self._early_emissions = attempt, [], []
        if self._changed.is_set() and attempt.grace is not None:
            attempt.grace.urge()  # the fleet has changed since this was looked at
        try:
            await self._journal.set_meta("epoch", self.epoch)
            outcome = await attempt.run(lambda seconds: self._prepared(attempt, seconds), lambda: self._hold(retired))
        except Exception:
            attempt.undo()
            self._after_failure(attempt, retired)
            raise
        finally:
            self._current = None
        self._commit(transition, outcome, attempt, target, mode)

    def _grace(self, retired: Sequence[Replica], target: Deployment) -> Grace:
        """The time that notices leave to the retired replicas, which is of use where `target` is too small."""
        devices = [device for replica in retired for device in replica.devices]
        models = sorted({replica.model for replica in retired})
        return Grace(
            lambda: self.membership.leaving_s(devices),
            lambda: any(self.dispatcher.unfinished(model) > target.batch(model) for model in models),
            timing_of(
                self._targets.promised_step_s(self.book),
                [self._specs[model] for model in models],
                self._settings.replication,
            ),
            margin_s=self._settings.timeouts.grace_margin_s,
        )

    def _after_failure(self, attempt: Reconfiguration, retired: Sequence[Replica]) -> None:
        self._forget(self._recovery.failed(attempt.stranded))
        self.dispatch()
        if attempt.paused:
            for replica in retired:
                if replica.number in self.dispatcher.replicas:
                    self._recovery.strand(replica)
        if attempt.activated:  # who took its role over is not known; who did let go of other weights
            needed = attempt.transition.needed
            for device in needed.keys() & self._resident.keys():
                self._resident[device] = common(self._resident[device], needed[device])

    def _number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _prepared(self, attempt: Reconfiguration, seconds: float) -> None:
        self._copies.incomplete(replica.number for replica in attempt.joined)
        self._events.emit("reconfiguration_prepared", epoch=self.epoch, seconds=seconds)

    def _hold(self, retired: Sequence[Replica]) -> None:
        for replica in retired:
            replica.serving = False

    def _commit(
        self, transition: Transition, outcome: Outcome, attempt: Reconfiguration, target: Deployment, mode: str
    ) -> None:
        """The new replicas are running: make them the layout, and give everyone else work again."""
        self._resident.update(outcome.resident)
        for replica in outcome.new:
            self.dispatcher.replicas[replica.number] = replica
        self._rehome(outcome, attempt)
        self._recovery.replay(self.dispatcher.drop(transition.retire), "unseated")
        self._copies.ended(transition.retire)
        self._forget(self._recovery.settle(attempt.stranded, tried=True))
        self.target, self._broken = target, bool(self._recovery.stranded)
        if attempt.store is not None:
            self._stores[outcome.epoch] = attempt.store
        self._close_stores()
        layout = layout_event(outcome, list(self.dispatcher.replicas.values()), target, self._recovery.replayed())
        self._events.emit("layout", mode=mode, **layout)
        self._metrics.migration("move", len(outcome.heirs) - len(outcome.restored))
        self._metrics.migration("restore", len(outcome.restored))
        for what, size_bytes in outcome.moved_bytes.items():
            self._metrics.moved(what, size_bytes)
        for phase, seconds in outcome.seconds.items():
            self._metrics.reconfiguration(phase, seconds)
        for device, message in self._early:
            self._take(device, message)
        for number, emission in self._early_emissions:
            if number in self.dispatcher.replicas:
                self._absorb(self.dispatcher.replicas[number], [emission])
        self._copies.keep(self.dispatcher.replicas.values(), [one.number for one in self._recovery.stranded])
        self.dispatch()

    def _rehome(self, outcome: Outcome, attempt: Reconfiguration) -> None:
        """Bind every request whose KV was moved or restored to its replica; who ended meanwhile is cancelled there."""
        for heir in outcome.heirs:
            record = attempt.forget(heir.key)
            if record is None or record.finish is not None:
                self.membership.send(heir.target.leader, m.Cancel(heir.target.number, [heir.key]))
                continue
            record.recoveries += heir.key in outcome.restored
            self.dispatcher.bind(record, heir.target)

    def _forget(self, numbers: Sequence[int]) -> None:
        """The caches of broken replicas are of no use any more."""
        if numbers:
            for device in self.membership.connected_devices():
                self.membership.send(device, m.Retire(sorted(numbers)))

    def _close_stores(self) -> None:
        in_use = {replica.epoch for replica in self.dispatcher.replicas.values()}
        for epoch in [epoch for epoch in self._stores if epoch not in in_use]:
            self._stores.pop(epoch).close()

    def _report_capacity(self) -> None:
        starved = not self.dispatcher.replicas
        if starved and not self.no_capacity:
            self._events.emit("no_capacity", devices=len(self.membership.usable_devices()))
        if self.no_capacity and not starved:
            self._events.emit("capacity_returned")
        self.no_capacity = starved
        self.dispatch()

    def _dismiss_idle(self) -> None:
        """Instances that are leaving and hold no position any more may go."""
        busy = {device.instance for replica in self.dispatcher.replicas.values() for device in replica.devices}
        for name, instance in self.membership.instances.items():
            if instance.leaving_at is not None and not instance.dismissed and name not in busy:
                self.membership.dismiss(name)
