"""Who is here, as anybody may ask: instances, their agents and workers, and which devices can be counted on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from data.cluster import ClusterState
from data.layout import Device
from serving import messages as m
from serving.controller.leases import LOOKS, Lease
from serving.controller.progress import Heard
from serving.requests import InstanceInfo
from serving.settings import Timeouts
from serving.transport import Connection

_RECENT_BEATS = 2.5  # a heartbeat older than this many of their intervals says nothing of now


@dataclass(slots=True, eq=False)
class Member:
    """A connected agent or worker; `pulse` is its last heartbeat, `pulse_at` the loop time of it."""

    connection: Connection[m.Upward]
    pid: int
    kv_address: str = ""
    lease: Lease = field(default_factory=Lease)
    pulse: m.Heartbeat | None = None
    pulse_at: float = 0.0
    verdict: str = ""  # why its connection was cut from here
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # its loss has been dealt with


@dataclass(slots=True, eq=False)
class InstanceState:
    """One instance: its agent, its workers by device index, and whether it is on its way out."""

    name: str
    type: str
    devices: int
    agent: Member | None = None
    workers: dict[int, Member] = field(default_factory=dict)
    leaving_at: float | None = None
    dismissed: bool = False
    advised: bool = False
    announced: bool = False
    zone: str = ""

    @property
    def complete(self) -> bool:
        """Whether agent and every worker are connected."""
        return self.agent is not None and self.workers.keys() == set(range(self.devices))

    @property
    def usable(self) -> bool:
        """Whether positions may be placed here."""
        return self.complete and self.leaving_at is None and not self.dismissed


class Roster:
    """The instances by name; whoever changes them is a `Membership`."""

    def __init__(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self.instances: dict[str, InstanceState] = {}

    def usable_devices(self) -> tuple[Device, ...]:
        """Devices that new positions may be placed on, in order."""
        return tuple(
            Device(name, index)
            for name, instance in sorted(self.instances.items())
            if instance.usable
            for index in range(instance.devices)
        )

    def advised_devices(self) -> frozenset[Device]:
        """Usable devices of instances that may have to go: better not counted on."""
        return frozenset(one for one in self.usable_devices() if self.instances[one.instance].advised)

    def leaving_s(self, devices: Iterable[Device]) -> float:
        """Seconds until the first of `devices` that was given notice goes; infinite if none was."""
        now = asyncio.get_running_loop().time()
        present = [self.instances[name] for name in {one.instance for one in devices} & self.instances.keys()]
        return min((one.leaving_at - now for one in present if one.leaving_at is not None), default=math.inf)

    def state(self) -> ClusterState:
        """The usable instances by type."""
        counts: dict[str, int] = {}
        for instance in self.instances.values():
            if instance.usable:
                counts[instance.type] = counts.get(instance.type, 0) + 1
        return ClusterState.of(counts)

    def connected(self, device: Device) -> bool:
        """Whether this worker can be spoken to."""
        instance = self.instances.get(device.instance)
        return instance is not None and device.index in instance.workers

    def connected_devices(self) -> tuple[Device, ...]:
        """Every worker that can be spoken to, in order."""
        return tuple(
            Device(name, index) for name, one in sorted(self.instances.items()) for index in sorted(one.workers)
        )

    def kv_address(self, device: Device) -> str:
        """Where a connected worker keeps copies of others' KV."""
        return self.instances[device.instance].workers[device.index].kv_address

    def worker(self, device: Device) -> Member | None:
        """A worker that is here."""
        instance = self.instances.get(device.instance)
        return instance.workers.get(device.index) if instance else None

    def host(self, device: Device) -> str:
        """The host that a worker's connection comes from; "" if it is not here."""
        member = self.worker(device)
        return member.connection.host if member is not None else ""

    def zone(self, device: Device) -> str:
        """The zone that the device's agent named; "" if it named none or is not here."""
        instance = self.instances.get(device.instance)
        return instance.zone if instance else ""

    def send(self, device: Device, message: m.Message) -> None:
        """Send to a worker; silently dropped if it is gone (its loss is reported on its own)."""
        member = self.worker(device)
        if member is not None:
            member.connection.send(message)

    def heard(self, device: Device) -> Heard | None:
        """What a worker last said of itself, and how long ago."""
        member = self.worker(device)
        if member is None or member.pulse is None:
            return None
        timeouts = self._timeouts
        oldest = asyncio.get_running_loop().time() - _RECENT_BEATS * timeouts.heartbeat_s
        return Heard(member.pulse, member.pulse_at >= oldest, member.lease.silent_looks * timeouts.lease_s / LOOKS)

    def describe(self, now: float) -> Iterator[InstanceInfo]:
        """Every known instance."""
        for name, one in sorted(self.instances.items()):
            left = None if one.leaving_at is None else max(0.0, one.leaving_at - now)
            state = "leaving" if left is not None else "ready" if one.complete else "joining"
            yield InstanceInfo(
                instance=name,
                type=one.type,
                devices=one.devices,
                state=state,  # type: ignore[arg-type]
                leaving_s=left,
                zone=one.zone,
            )
