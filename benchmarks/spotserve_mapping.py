"""One device-mapping case of the SpotServe reference: its inputs as ours, and the quantities it is scored by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from data.layout import Device, ParallelConfig, Position
from planning.edge_weights import GptShape, InterruptedBatches, edge_weights, weight_unit
from planning.matching import Matrix, best_matching, matched_value, near_matching
from planning.ordering import Role

Assignment = Mapping[str, Sequence[Sequence[int] | None]]


@dataclass(frozen=True, slots=True)
class MappingCase:
    """`devices` are those available afterwards, `held` their old positions (None: new or
    spare), `before` all old positions, those of leaving devices too.
    """

    model: GptShape
    old: ParallelConfig
    new: ParallelConfig
    devices: tuple[Device, ...]
    held: tuple[Position | None, ...]
    before: Mapping[Device, Position]
    weights: Matrix
    tolerance: float

    @classmethod
    def read(
        cls, case: Mapping[str, Any], model: Mapping[str, Any], old: Sequence[int], new: Sequence[int]
    ) -> MappingCase:
        """Read the fields that device-mapping cases and replayed switches share."""
        shape = GptShape(model["layers"], model["vocab"], model["hidden"], model["max_seq"])
        source, target = read_config(old), read_config(new)
        per_instance = range(case["gpus_per_instance"])
        devices = tuple(Device(str(instance), gpu) for instance in case["available_instances"] for gpu in per_instance)
        placed = _positions(case["old_assignment"])
        held = tuple(placed.get(device) for device in devices)
        batches = InterruptedBatches(
            case["kv_batch_per_old_pipeline"] or (), case["kv_len"], case["inherits_old_pipeline"]
        )
        weights = edge_weights(shape, source, target, held, batches)
        return cls(shape, source, target, devices, held, placed, weights, case.get("memory_tolerance", 0.0))

    def match(self) -> list[int]:
        """Our mapping: groups on the fewest instances, and among equals devices stay where they are."""
        instances = {name: number for number, name in enumerate(dict.fromkeys(d.instance for d in self.devices))}
        groups = [position.replica * self.new.stages + position.stage for position in self.new.positions()]
        return near_matching(self.weights, self._stay(), [instances[d.instance] for d in self.devices], groups)

    def flat_optimum(self) -> float:
        """Weight of the best matching of devices to positions without regard to instances."""
        return self.weight(best_matching(self.weights))

    def weight(self, rows: Sequence[int]) -> float:
        """Reused elements / hidden size of a matching."""
        return matched_value(self.weights, rows) / weight_unit(self.model, self.old, self.new)

    def matrix(self, rows: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
        """Weights of the given `[instance, gpu]` rows in the published unit."""
        index = {device: row for row, device in enumerate(self.devices)}
        chosen = [index[Device(str(instance), gpu)] for instance, gpu in rows]
        scaled: npt.NDArray[np.float64] = self.weights[chosen] / weight_unit(self.model, self.old, self.new)
        return scaled

    def rows_of(self, assignment: Assignment) -> list[int]:
        """The matching that an assignment of the case file says."""
        index = {device: row for row, device in enumerate(self.devices)}
        row_of = {position: index[device] for device, position in _positions(assignment).items()}
        return [row_of[position] for position in self.new.positions()]

    def moved(self, rows: Sequence[int]) -> int:
        """Devices with an old position that do not have the same position now."""
        now = dict(zip(rows, self.new.positions(), strict=True))
        return sum(have is not None and now.get(row) != have for row, have in enumerate(self.held))

    def survivors(self, rows: Sequence[int]) -> list[tuple[Role, Role | None]]:
        """Old and new (stage, shard) of every device that held weights."""
        now = {row: (position.stage, position.shard) for row, position in zip(rows, self.new.positions(), strict=True)}
        return [((have.stage, have.shard), now.get(row)) for row, have in enumerate(self.held) if have is not None]

    def unlocked(self, rows: Sequence[int]) -> list[list[int]]:
        """`[instance, gpu]` of old devices, leaving ones too, that receive no weights while the shape stays."""
        if self.old.shape != self.new.shape:
            return []
        now = {self.devices[row]: position for row, position in zip(rows, self.new.positions(), strict=True)}
        quiet = [
            device
            for device, have in self.before.items()
            if device not in now or (have.stage, have.shard) == (now[device].stage, now[device].shard)
        ]
        return sorted([int(device.instance), device.index] for device in quiet)

    @property
    def grows_only(self) -> bool:
        """Whether nobody has to move: same shape, no fewer replicas, and every old position still there."""
        kept = sum(position is not None for position in self.held)
        return self.old.shape == self.new.shape and self.new.replicas >= self.old.replicas and kept == self.old.devices

    def crossing_bytes(self, rows: Sequence[int]) -> float:
        """fp32 bytes of layers that instances need and none of their devices holds, one copy per instance."""
        cut = lcm(self.old.shards, self.new.shards)
        needed: dict[str, set[tuple[int, int]]] = {}
        for row, position in zip(rows, self.new.positions(), strict=True):
            needed.setdefault(self.devices[row].instance, set()).update(self._cells(self.new, position, cut))
        for device, have in zip(self.devices, self.held, strict=True):
            if have is not None and device.instance in needed:
                needed[device.instance].difference_update(self._cells(self.old, have, cut))
        hidden = self.model.hidden
        return sum(map(len, needed.values())) * 4 * (12 * hidden**2 + 7 * hidden) / cut

    def _cells(self, config: ParallelConfig, position: Position, cut: int) -> set[tuple[int, int]]:
        """(layer, fine shard) pairs of a position when every layer is cut into `cut` fine shards."""
        width = cut // config.shards
        layers = range(*config.stage_layers(position.stage, self.model.layers))
        return {(layer, position.shard * width + fine) for layer in layers for fine in range(width)}

    def _stay(self) -> Matrix:
        columns = {position: column for column, position in enumerate(self.new.positions())}
        stay = np.zeros_like(self.weights)
        for row, have in enumerate(self.held):
            if have in columns:
                stay[row, columns[have]] = 1
        return stay


def read_config(degrees: Sequence[int]) -> ParallelConfig:
    """A `[D, P, M]` triple of the case files."""
    replicas, stages, shards = degrees
    return ParallelConfig(replicas, stages, shards, max_batch=1)


def _positions(assignment: Assignment) -> dict[Device, Position]:
    return {
        Device(str(instance), gpu): Position(*position)
        for instance, row in assignment.items()
        for gpu, position in enumerate(row)
        if position is not None
    }
