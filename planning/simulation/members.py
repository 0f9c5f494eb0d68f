"""Who is in a simulated fleet, which weights they hold, and which transition a target takes from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from data.cluster import ClusterState
from data.errors import Infeasible
from data.layout import Device, ParallelConfig
from data.plan import PlanBook
from planning.preference import spare_ranks
from planning.resharding import Box
from planning.simulation.lines import Line
from planning.transition import LiveReplica, Transition, plan_transition, position_boxes, retained

_ELEMENT_BYTES = 4


@dataclass(slots=True)
class Members:
    """`instances` that are here, those among them that were told to leave, and the boxes that devices hold.

    All are of the first type of `book`.
    """

    book: PlanBook
    instances: list[str]
    leaving: set[str] = field(default_factory=set)
    resident: dict[Device, tuple[Box, ...]] = field(default_factory=dict)

    def target(self) -> ParallelConfig | None:
        """What the book says to run on those that stay."""
        staying = len(self.instances) - len(self.leaving)
        return self.book.plan_for(ClusterState.of({self.book.cluster.types[0].name: staying} if staying else {})).config

    def usable(self) -> list[Device]:
        """Devices that new positions may be placed on."""
        devices = range(self.book.cluster.types[0].devices)
        staying = [name for name in sorted(self.instances) if name not in self.leaving]
        return [Device(name, index) for name in staying for index in devices]

    def plan(self, target: ParallelConfig, lines: Mapping[int, Line]) -> Transition | None:
        """From the replicas that live to the target; None if too few devices are here."""
        live = [LiveReplica(one.number, one.config, one.devices, one.known_tokens) for one in lines.values()]
        usable, held = self.usable(), self.resident
        try:
            return plan_transition(
                self.book.model, target, live=live, usable=usable, resident=held, element_bytes=_ELEMENT_BYTES
            )
        except Infeasible:
            return None

    def hold(self, needed: Mapping[Device, tuple[Box, ...]]) -> None:
        """New positions have been taken over."""
        for device, boxes in needed.items():
            self.resident[device] = retained(self.resident.get(device, ()), boxes)

    def forget(self, instance: str) -> None:
        """An instance is gone."""
        self.instances.remove(instance)
        self.leaving.discard(instance)
        self.resident = {device: boxes for device, boxes in self.resident.items() if device.instance != instance}

    def clear_up(self, config: ParallelConfig | None, lines: Mapping[int, Line]) -> None:
        """Dismiss who is leaving and holds no position; spare devices fetch the weights of one each."""
        busy = {device for line in lines.values() for device in line.devices}
        for name in self.leaving - {device.instance for device in busy}:
            self.forget(name)
        if config is None:
            return
        spares = [device for device in self.usable() if device not in busy]
        for device, rank in zip(spares, spare_ranks(len(spares), config.replica_devices, ()), strict=True):
            if not self.resident.get(device):
                self.resident[device] = position_boxes(self.book.model, config, rank)
