"""What has to change to get from the replicas that live now to a target configuration.

Replicas have numbers that are never reused. All live replicas of a fleet of one model share one shape, because
whatever a transition does not keep it retires; groups of several models are `planning.sharing`'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from data.layout import Device, Layout, ParallelConfig, Position
from data.models import ModelSpec
from planning.mapping import assign
from planning.resharding import Box, WeightPlan, weight_boxes, weight_transfers


@dataclass(frozen=True, slots=True)
class LiveReplica:
    """A replica whose devices all work: its devices in (stage, shard) order and its cached tokens.

    Replicas on the same devices are a group. `config` describes one replica. `keepers` are, rank by rank, the
    devices that keep a copy of its KV (None: nobody does).
    """

    number: int
    config: ParallelConfig
    devices: tuple[Device, ...]
    cached_tokens: int = 0
    model: str = ""
    kv_share: float = 1.0
    keepers: tuple[Device | None, ...] = ()


@dataclass(frozen=True, slots=True)
class NewReplica:
    """A replica to be built as `config` says, and the retired replicas whose requests it goes on with."""

    devices: tuple[Device, ...]
    inherits: tuple[int, ...]
    config: ParallelConfig
    model: str = ""
    kv_share: float = 1.0


@dataclass(frozen=True, slots=True)
class Transition:
    """`keep` goes on untouched, `retire` stops, `new` is built.

    `needed` are the boxes that each device of a new replica must hold, `weights` where they come from.
    """

    keep: tuple[int, ...]
    retire: tuple[int, ...]
    new: tuple[NewReplica, ...]
    needed: Mapping[Device, tuple[Box, ...]]
    weights: WeightPlan

    @property
    def empty(self) -> bool:
        """Whether nothing has to change."""
        return not self.new and not self.retire


def plan_transition(
    spec: ModelSpec,
    target: ParallelConfig,
    *,
    live: Sequence[LiveReplica],
    usable: Sequence[Device],
    resident: Mapping[Device, Sequence[Box]],
    element_bytes: int,
    whole: bool = False,
) -> Transition:
    """Map `target` onto the usable devices with the least movement.

    With `whole`, every device of a new replica is to hold the whole model, so that later changes move no weights.

    `resident` lists the boxes of every device that still answers, also of those that are leaving:
    they may serve as sources. Raises `Infeasible` if the target needs more devices than are usable.
    """
    ordered = sorted(live, key=lambda replica: replica.number)
    old = _as_layout(ordered)
    mapped = assign(
        spec,
        target,
        usable,
        old=old,
        resident={device: resident.get(device, ()) for device in usable},  # a restarted worker holds nothing
        kv_tokens=[replica.cached_tokens for replica in ordered],
        copies=copies_of(ordered),
        kv_element_bytes=element_bytes,
    )
    kept = {after: before for before, after in mapped.kept if ordered[before].config.max_batch == target.max_batch}
    keep = tuple(sorted(ordered[before].number for before in kept.values()))
    new = tuple(
        NewReplica(
            mapped.layout.replica_devices(index),
            tuple(ordered[before].number for before, heir in enumerate(mapped.inherits) if heir == index),
            replace(target, replicas=1),
        )
        for index in range(target.replicas)
        if index not in kept
    )
    needed = _needed(spec, replace(target, stages=1, shards=1, partition=()) if whole else target, new)
    return Transition(
        keep=keep,
        retire=tuple(replica.number for replica in ordered if replica.number not in keep),
        new=new,
        needed=needed,
        weights=weight_transfers(needed, resident, element_bytes=element_bytes),
    )


def copies_of(live: Sequence[LiveReplica]) -> dict[Device, list[Position]]:
    """Of which positions' KV devices keep copies; replicas are numbered as they are listed."""
    found: dict[Device, list[Position]] = defaultdict(list)
    for index, one in enumerate(live):
        for rank, keeper in enumerate(one.keepers):
            if keeper is not None:
                found[keeper].append(Position(index, *divmod(rank, one.config.shards)))
    return found


def _as_layout(live: Sequence[LiveReplica]) -> Layout | None:
    if not live:
        return None
    devices = tuple(device for replica in live for device in replica.devices)
    return Layout(replace(live[0].config, replicas=len(live)), devices)


def _needed(spec: ModelSpec, target: ParallelConfig, new: Sequence[NewReplica]) -> dict[Device, tuple[Box, ...]]:
    return {
        device: position_boxes(spec, target, rank) for replica in new for rank, device in enumerate(replica.devices)
    }


def position_boxes(spec: ModelSpec, config: ParallelConfig, rank: int) -> tuple[Box, ...]:
    """What rank `rank` of a replica needs; ranks beyond it start over."""
    stage, shard = divmod(rank % (config.stages * config.shards), config.shards)
    return weight_boxes(spec, config, Position(0, stage, shard))


def common(held: Sequence[Box], needed: Sequence[Box]) -> tuple[Box, ...]:
    """What a device holds for certain, whether or not it took over `needed`; boxes have one per tensor at most."""
    by_tensor = {box.tensor: box for box in held}
    return tuple(
        both for box in needed if box.tensor in by_tensor and (both := by_tensor[box.tensor].overlap(box)) is not None
    )


def retained(held: Sequence[Box], needed: Sequence[Box]) -> tuple[Box, ...]:
    """What a device holds after it took over `needed`: a box inside a held one stays a view of it."""
    by_tensor = {box.tensor: box for box in held}
    return tuple(
        by_tensor[box.tensor] if box.tensor in by_tensor and by_tensor[box.tensor].overlap(box) == box else box
        for box in needed
    )
