"""Who keeps copies of whose KV: every rank's go to another instance, of another zone if there is one, the least
burdened first.

Copies of replicas that are no more stay until those of the replicas that followed are complete: a request
that is hit in between goes on from the older copy.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from data.layout import Device
from planning.restoration import Keeper, apart, holder
from serving import messages as m
from serving.controller.dispatch import Replica

_FORMER = 8  # replicas that are no more; a log takes as much memory as the cache had


class Workers(Protocol):
    """The part of membership that copies are arranged through."""

    def send(self, device: Device, message: m.Message) -> None:
        """Send to a worker."""

    def connected_devices(self) -> tuple[Device, ...]:
        """All workers that can be spoken to."""

    def usable_devices(self) -> tuple[Device, ...]:
        """Those that stay."""

    def kv_address(self, device: Device) -> str:
        """Where a connected worker keeps copies."""

    def zone(self, device: Device) -> str:
        """The zone of its instance; "" if nobody told."""


class Copies:
    """The holder of every rank's KV, whose copies are complete, and which may be dropped."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._holders: dict[tuple[int, Device], Device] = {}
        self._complete: set[tuple[int, Device]] = set()
        self._former: deque[int] = deque(maxlen=_FORMER)
        self._kept: list[int] = []

    def arrange(self, replicas: Iterable[Replica]) -> None:
        """See that every rank of the live replicas has a holder that is here and stays, if there is one."""
        ranks = {(replica.number, device) for replica in replicas for device in replica.devices}
        staying = self._workers.usable_devices()
        self._holders = {
            rank: one
            for rank, one in self._holders.items()
            if rank in ranks and one in staying and not self._exposed(rank[1], one, staying)
        }
        self._complete &= self._holders.keys()
        for rank in sorted(ranks - self._holders.keys()):
            self._choose(rank, staying)

    def _exposed(self, device: Device, keeper: Device, staying: Sequence[Device]) -> bool:
        """Whether a rank's copies are in its own zone although there is another. What it has stays until others are."""
        zone = self._workers.zone
        return not apart(zone(device), zone(keeper)) and any(apart(zone(device), zone(one)) for one in staying)

    def _choose(self, rank: tuple[int, Device], staying: Sequence[Device]) -> None:
        number, device = rank
        loads = Counter(self._holders.values())
        after = sum(other <= device for other in staying)
        zone = self._workers.zone
        index = holder(
            device.instance, zone(device), [Keeper(one.instance, zone(one), loads[one]) for one in staying], after
        )
        if index is None:
            return
        self._holders[rank] = staying[index]
        self._complete.discard(rank)
        self._workers.send(device, m.Replicate(number, self._workers.kv_address(staying[index])))

    def heard(self, device: Device, state: m.CopyState) -> None:
        """A rank says how far its copy is."""
        rank = state.replica, device
        if state.complete and rank in self._holders:
            self._complete.add(rank)
        else:
            self._complete.discard(rank)

    def lost(self, device: Device) -> None:
        """A worker is gone, and what it kept."""
        self._holders = {rank: one for rank, one in self._holders.items() if one != device}
        self._complete &= self._holders.keys()

    def incomplete(self, numbers: Iterable[int]) -> None:
        """Requests are about to join these replicas: their copies are not complete until their ranks say so again."""
        void = set(numbers)
        self._complete = {rank for rank in self._complete if rank[0] not in void}

    def complete(self, replica: Replica) -> bool:
        """Whether all KV of a replica is kept elsewhere, but for what the last steps added."""
        return all((replica.number, device) in self._complete for device in replica.devices)

    def keepers(self, replica: Replica) -> tuple[Device | None, ...]:
        """Who keeps the copy of every rank of a replica; None where it is not complete."""
        ranks = ((replica.number, device) for device in replica.devices)
        return tuple(self._holders[rank] if rank in self._complete else None for rank in ranks)

    @property
    def former(self) -> tuple[int, ...]:
        """Replicas that are no more, and whose copies may hold what those of later ones do not."""
        return tuple(self._former)

    def ended(self, numbers: Iterable[int]) -> None:
        """Replicas that are no more."""
        self._former.extend(number for number in numbers if number not in self._former)

    def keep(self, live: Iterable[Replica], others: Iterable[int] = ()) -> None:
        """Copies are needed of live replicas, of `others`, and of former ones until all live ones' are complete."""
        live = list(live)
        if self._former and live and all(self.complete(one) for one in live):
            self._former.clear()
        wanted = sorted({*(one.number for one in live), *others, *self._former})
        if wanted != self._kept:
            self._kept = wanted
            for device in self._workers.connected_devices():
                self._workers.send(device, m.Keep(wanted))
