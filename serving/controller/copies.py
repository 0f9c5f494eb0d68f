"""Who keeps copies of whose KV: every rank's go to another instance, the least burdened first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from data.layout import Device
from planning.restoration import holder
from serving import messages as m
from serving.controller.dispatch import Replica


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


class Copies:
    """The holder of every rank's KV, and which logs may be dropped."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._holders: dict[tuple[int, Device], Device] = {}

    def arrange(self, replicas: Iterable[Replica]) -> None:
        """See that every rank of the live replicas has a holder that is here and stays, if there is one."""
        ranks = {(replica.number, device) for replica in replicas for device in replica.devices}
        staying = self._workers.usable_devices()
        self._holders = {rank: one for rank, one in self._holders.items() if rank in ranks and one in staying}
        for rank in sorted(ranks - self._holders.keys()):
            self._choose(rank, staying)

    def _choose(self, rank: tuple[int, Device], staying: Sequence[Device]) -> None:
        number, device = rank
        loads = Counter(self._holders.values())
        after = sum(other <= device for other in staying)
        index = holder(device.instance, [(one.instance, loads[one]) for one in staying], after)
        if index is None:
            return
        self._holders[rank] = staying[index]
        self._workers.send(device, m.Replicate(number, self._workers.kv_address(staying[index])))

    def keep(self, numbers: Iterable[int]) -> None:
        """Copies of all other replicas are of no use any more."""
        wanted = sorted(set(numbers))
        for device in self._workers.connected_devices():
            self._workers.send(device, m.Keep(wanted))
