"""The fewest bytes that a change of layout must move, worked out anew from what was resident before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.layout import Device, Layout, ParallelConfig, Position
from data.models import ModelSpec
from planning.resharding import Box, KvTransfer, kv_transfers, replica_extents, weight_boxes
from planning.transition import LiveReplica, NewReplica, Transition, plan_transition, retained

_WHOLE = ParallelConfig(1, 1, 1, 1)


@dataclass(frozen=True, slots=True)
class Least:
    """Bytes: weights and KV that must reach a device which lacks them, KV that stays where it is, and what the
    busiest direction of any device carries of each.
    """

    weights_bytes: int
    kv_bytes: int
    kv_staying_bytes: int
    busiest_weights_bytes: int
    busiest_kv_bytes: int


@dataclass(slots=True)
class World:
    """Who holds what: followed from layout to layout as the controller does."""

    spec: ModelSpec
    element_bytes: int
    whole_model_resident: bool = False
    resident: dict[Device, tuple[Box, ...]] = field(default_factory=dict)
    live: tuple[LiveReplica, ...] = ()
    _born: int = 0

    def advance(self, target: ParallelConfig, usable: Sequence[Device], tokens: int, data: Mapping[str, Any]) -> Least:
        """What the change to the layout of the event `data` had to move with `tokens` cached, and take it as done."""
        live = self._with_tokens(tokens)
        held = self.resident
        if self.whole_model_resident:
            whole = weight_boxes(self.spec, _WHOLE, Position(0, 0, 0))
            held = {**held, **dict.fromkeys(usable, whole)}
        transition = plan_transition(
            self.spec, target, live=live, usable=usable, resident=held, element_bytes=self.element_bytes
        )
        least = self._least(transition, live)
        self._adopt(target, transition, live, data)
        return least

    def _with_tokens(self, tokens: int) -> tuple[LiveReplica, ...]:
        """All cached tokens are where the last change brought them; a fresh start shares them out evenly."""
        shares = [one.cached_tokens for one in self.live]
        total = sum(shares)
        fractions = [share / total for share in shares] if total else [1 / len(shares)] * len(shares) if shares else []
        return tuple(
            LiveReplica(one.number, one.config, one.devices, round(tokens * fraction))
            for one, fraction in zip(self.live, fractions, strict=True)
        )

    def _least(self, transition: Transition, live: Sequence[LiveReplica]) -> Least:
        weights = [
            (item.source, item.destination, item.elements * self.element_bytes)
            for item in (*transition.weights.transfers, *transition.weights.relays)
        ]
        kv = [
            (item.source, item.destination, self._kv_bytes(item, one.cached_tokens // len(heirs)))
            for one in live
            if one.number in transition.retire and (heirs := _heirs(transition, one.number))
            for new in heirs
            for item in self._routes(new.config, new, one)
        ]
        moving = [item for item in kv if item[0] != item[1]]
        return Least(
            weights_bytes=sum(size for _, _, size in weights),
            kv_bytes=sum(size for _, _, size in moving),
            kv_staying_bytes=sum(size for source, destination, size in kv if source == destination),
            busiest_weights_bytes=_busiest(weights),
            busiest_kv_bytes=_busiest(moving),
        )

    def _routes(self, config: ParallelConfig, new: NewReplica, old: LiveReplica) -> Sequence[KvTransfer]:
        there = replica_extents(self.spec, Layout(config, new.devices), 0)
        here = replica_extents(self.spec, Layout(old.config, old.devices), 0)
        return kv_transfers(there, here) or ()

    def _kv_bytes(self, item: KvTransfer, tokens: int) -> int:
        cells = (item.layers[1] - item.layers[0]) * (item.heads[1] - item.heads[0])
        return 2 * cells * self.spec.head_dim * self.element_bytes * tokens

    def _adopt(
        self, target: ParallelConfig, transition: Transition, live: Sequence[LiveReplica], data: Mapping[str, Any]
    ) -> None:
        """Take over the positions that came into force, with the tokens of those whose requests they inherit."""
        tokens = {one.number: one.cached_tokens for one in live}
        after = [LiveReplica(one.number, one.config, one.devices, one.cached_tokens) for one in live]
        after = [one for one in after if one.number in transition.keep]
        for new in transition.new:
            self._born += 1
            cached = sum(
                tokens[number] // len(heirs)
                for number in transition.retire
                if new in (heirs := _heirs(transition, number))
            )
            after.append(LiveReplica(self._born, new.config, new.devices, cached))
        self.live = tuple(after)
        for position in data["positions"]:
            device = parsed(position["device"])
            needed = weight_boxes(self.spec, target, Position(0, position["stage"], position["shard"]))
            self.resident[device] = retained(self.resident.get(device, ()), needed)

    def forget_tokens(self) -> None:
        """The requests are new ones, spread evenly."""
        self.live = tuple(LiveReplica(one.number, one.config, one.devices) for one in self.live)


def _busiest(moves: Sequence[tuple[Device | None, Device, int]]) -> int:
    """The most that one device sends or receives."""
    load: Counter[tuple[str, str]] = Counter()
    for source, destination, size in moves:
        load["in", str(destination)] += size
        if source is not None:
            load["out", str(source)] += size
    return max(load.values(), default=0)


def _heirs(transition: Transition, number: int) -> list[NewReplica]:
    """The new replicas that take over from an old one, in equal parts; those that inherit nothing get a part too."""
    return [one for one in transition.new if number in one.inherits or not one.inherits]


def parsed(device: str) -> Device:
    """The device that an event names."""
    instance, _, index = device.rpartition("/")
    return Device(instance, int(index))


def against(moved: Mapping[str, int], seconds: Mapping[str, float], least: Least) -> dict[str, Any]:
    """Bytes that the event `layout` reports beside the fewest, and rates of the busiest link in bytes per second."""
    weights = sum(moved.get(f"weights_{kind}_bytes", 0) for kind in ("intra", "inter", "disk"))
    return {
        "weights_bytes": weights,
        "least_weights_bytes": least.weights_bytes,
        "kv_bytes": moved["kv_bytes"],
        "least_kv_bytes": least.kv_bytes,
        "excess": _share(weights + moved["kv_bytes"], least.weights_bytes + least.kv_bytes),
        "weights_rate": _rate(least.busiest_weights_bytes, seconds["weights"]),
        "kv_rate": _rate(least.busiest_kv_bytes, seconds["kv"]),
    }


def _share(moved: int, least: int) -> float | None:
    """How much more than the fewest was moved, as a part of it; None if nothing had to move and something did."""
    if not least:
        return 0.0 if not moved else None
    return round(moved / least - 1, 5)


def _rate(size: int, seconds: float) -> float | None:
    return round(size / seconds) if size and seconds > 0 else None
