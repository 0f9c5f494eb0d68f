"""What has to change to get from the groups that live now to those that a deployment wants.

A group is kept as it is or built anew: whoever shares its devices shares its fate. Groups of a deployment may have
different shapes and host different models; the boxes of all models of a device are moved as one set.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from data.deployment import Deployment, Hosted, SharedGroup, split_name, tensor_name
from data.errors import Infeasible
from data.layout import Device, Layout
from data.models import ModelSpec
from planning.mapping import kv_reuse, weight_reuse
from planning.matching import Matrix, best_matching, near_matching
from planning.resharding import Box, weight_transfers
from planning.transition import LiveReplica, NewReplica, Transition, copies_of, plan_transition, position_boxes


@dataclass(frozen=True, slots=True)
class LiveGroup:
    """The replicas that share some devices."""

    group: SharedGroup
    devices: tuple[Device, ...]
    replicas: tuple[LiveReplica, ...]

    @property
    def cached_tokens(self) -> int:
        """Of all its replicas."""
        return sum(one.cached_tokens for one in self.replicas)


def live_groups(live: Sequence[LiveReplica]) -> tuple[LiveGroup, ...]:
    """The groups of live replicas, by their first replica's number."""
    by_devices: dict[tuple[Device, ...], list[LiveReplica]] = defaultdict(list)
    for replica in sorted(live, key=lambda one: one.number):
        by_devices[replica.devices].append(replica)
    return tuple(LiveGroup(_group_of(some), devices, tuple(some)) for devices, some in by_devices.items())


def _group_of(replicas: Sequence[LiveReplica]) -> SharedGroup:
    config = replicas[0].config
    hosted = (Hosted(one.model, one.config.max_batch, one.kv_share, one.config.partition) for one in replicas)
    return SharedGroup(config.stages, config.shards, tuple(hosted))


def group_boxes(
    specs: Mapping[str, ModelSpec], group: SharedGroup, rank: int, *, whole: bool = False
) -> tuple[Box, ...]:
    """What rank `rank` of a group holds of its models; with `whole` all of them in full."""
    return tuple(
        replace(box, tensor=tensor_name(hosted.model, box.tensor))
        for hosted in group.hosted
        for config in [group.config(hosted)]
        for box in position_boxes(
            specs[hosted.model], replace(config, stages=1, shards=1, partition=()) if whole else config, rank
        )
    )


def plan_deployment(
    specs: Mapping[str, ModelSpec],
    target: Deployment,
    *,
    live: Sequence[LiveReplica],
    usable: Sequence[Device],
    resident: Mapping[Device, Sequence[Box]],
    element_bytes: int,
    whole: bool = False,
) -> Transition:
    """Map `target` onto the usable devices with the least movement; arguments as for `plan_transition`.

    Groups that live as the target wants them stay, those with most cached tokens first. Raises `Infeasible` if
    the others need more devices than are left.
    """
    if (config := target.uniform) is not None:
        return plan_transition(
            specs[""], config, live=live, usable=usable, resident=resident, element_bytes=element_bytes, whole=whole
        )
    kept = _kept(target, live_groups(live), usable)
    staying = {device for one in kept for device in one.devices}
    keep = tuple(sorted(one.number for group in kept for one in group.replicas))
    retired = [one for one in live if one.number not in keep]
    build = _Build(
        specs,
        tuple((target.counts - Counter(one.group for one in kept)).elements()),
        [device for device in sorted(set(usable)) if device not in staying],
        retired,
        element_bytes,
    )
    places = build.places({device: resident.get(device, ()) for device in build.free})
    needed = {
        device: group_boxes(specs, group, rank, whole=whole)
        for group, devices in zip(build.groups, places, strict=True)
        for rank, device in enumerate(devices)
    }
    return Transition(
        keep=keep,
        retire=tuple(sorted(one.number for one in retired)),
        new=tuple(build.replicas(places)),
        needed=needed,
        weights=weight_transfers(needed, resident, element_bytes=element_bytes),
    )


def _kept(target: Deployment, groups: Sequence[LiveGroup], usable: Sequence[Device]) -> list[LiveGroup]:
    wanted, here = Counter(target.counts), set(usable)
    kept = []
    for one in sorted(groups, key=lambda one: (-one.cached_tokens, one.devices)):
        if wanted[one.group] and here.issuperset(one.devices):
            wanted[one.group] -= 1
            kept.append(one)
    return kept


@dataclass(frozen=True, slots=True)
class _Build:
    """Groups to be built on free devices, equal ones next to each other, and the replicas that end."""

    specs: Mapping[str, ModelSpec]
    groups: tuple[SharedGroup, ...]
    free: Sequence[Device]
    retired: Sequence[LiveReplica]
    element_bytes: int

    def heirs(self) -> dict[int, int]:
        """Which group goes on with the requests of which retired replica: fullest first, where fewest tokens are."""
        load, chosen = Counter[tuple[str, int]](), {}
        for one in sorted(self.retired, key=lambda one: (-one.cached_tokens, one.number)):
            hosts = [index for index, group in enumerate(self.groups) if one.model in group.models]
            if hosts:
                heir = min(hosts, key=lambda index: (load[one.model, index], index))
                load[one.model, heir] += 1 + one.cached_tokens
                chosen[one.number] = heir
        return chosen

    def replicas(self, places: Sequence[tuple[Device, ...]]) -> list[NewReplica]:
        """A replica of every model of every group at its place."""
        heirs = self.heirs()
        models = {one.number: one.model for one in self.retired}
        return [
            NewReplica(
                devices,
                tuple(n for n, heir in sorted(heirs.items()) if heir == index and models[n] == hosted.model),
                group.config(hosted),
                hosted.model,
                hosted.kv_share,
            )
            for index, (group, devices) in enumerate(zip(self.groups, places, strict=True))
            for hosted in group.hosted
        ]

    def places(self, held: Mapping[Device, Sequence[Box]]) -> list[tuple[Device, ...]]:
        """The devices of every group. Tensor-parallel groups choose first, the widest before all others, among
        devices that are worth most to them beyond what they are worth to any other; those without shards are
        matched together, exactly.
        """
        if sum(group.devices for group in self.groups) > len(self.free):
            wanted = ", ".join(map(str, self.groups))
            raise Infeasible(f"{wanted} need more devices than the {len(self.free)} that are free; choose fewer groups")
        starts = np.cumsum([0, *(group.devices for group in self.groups)])
        values = self._values(held)
        rows: dict[int, int] = {}
        for shards in sorted({group.shards for group in self.groups}, reverse=True):
            chosen = [index for index, group in enumerate(self.groups) if group.shards == shards]
            columns = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in chosen])
            rows |= self._matched(values, columns, shards, rows)
        found = [self.free[rows[column]] for column in range(starts[-1])]
        return [tuple(found[starts[index] : starts[index + 1]]) for index in range(len(self.groups))]

    def _matched(self, values: Matrix, columns: Matrix, shards: int, taken: Mapping[int, int]) -> dict[int, int]:
        left = np.setdiff1d(np.arange(len(self.free)), list(taken.values()))
        later = np.setdiff1d(np.arange(values.shape[1]), [*taken, *columns])
        elsewhere = values[np.ix_(left, later)].max(axis=1, initial=0)
        worth = values[np.ix_(left, columns)] - elsewhere[:, None]
        worth -= worth.min(initial=0)
        if shards == 1:
            rows = best_matching(worth)
        else:
            numbers = {name: at for at, name in enumerate(dict.fromkeys(device.instance for device in self.free))}
            instances = [numbers[self.free[row].instance] for row in left]
            rows = near_matching(worth, None, instances, [at // shards for at in range(len(columns))])
        return {int(column): int(left[row]) for column, row in zip(columns, rows, strict=True)}

    def _values(self, held: Mapping[Device, Sequence[Box]]) -> Matrix:
        """Bytes of weights and live KV that each free device already holds of each position of each group."""
        split = {id(boxes): _by_model(boxes) for boxes in held.values()}
        parts = [np.zeros((len(self.free), 0), dtype=np.int64)]
        for group, equal in groupby(self.groups):
            values = np.zeros((len(self.free), group.devices), dtype=np.int64)
            for hosted in group.hosted:
                boxes = [split[id(held[device])].get(hosted.model, ()) for device in self.free]
                values += weight_reuse(self.specs[hosted.model], group.config(hosted), boxes)
            parts += [values.copy() for _ in equal]
        for number, heir in self.heirs().items():
            parts[heir + 1] += self._kv(next(one for one in self.retired if one.number == number), self.groups[heir])
        return np.concatenate(parts, axis=1)

    def _kv(self, old: LiveReplica, group: SharedGroup) -> Matrix:
        spec = self.specs[old.model]
        hosted = next(one for one in group.hosted if one.model == old.model)
        layout, tokens = Layout(old.config, old.devices), [old.cached_tokens]
        cells = kv_reuse(spec, layout, group.config(hosted), self.free, tokens, [0], copies_of([old]))
        return 2 * spec.head_dim * self.element_bytes * cells


def _by_model(boxes: Sequence[Box]) -> dict[str, tuple[Box, ...]]:
    found: dict[str, list[Box]] = defaultdict(list)
    for box in boxes:
        model, tensor = split_name(box.tensor)
        found[model].append(replace(box, tensor=tensor))
    return {model: tuple(some) for model, some in found.items()}
