"""A shared fleet as arrays: what the compiled simulations look up instead of dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.errors import InvalidInput
from data.placement import Group, Shape, SharedFleet, StageProfile

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

STAGE_PENALTY = 0.009
"""AlpaServe's charge for every stage of a pipeline, as a share of each stage's time."""
SHORT_STAGES = 8
"""Pipelines up to this long are simulated without a loop over their stages."""


@dataclass(frozen=True)
class Tables:
    """Row `kinds[m] * len(shapes) + c` of `stage_s` and `weight_bytes` is model m in shape c.

    `stage_s` are the simulated stage times: profile × (1 + 0.009 × stages), rounded to float32, kept as float64; 0
    beyond the last stage, infinite where there is no profile. There are `SHORT_STAGES` columns or more. `stages` is per
    shape the most stages of any profile.
    `weight_bytes` is the largest stage's (memory rule A), infinite likewise. `slo_s` is rounded to float32 too.
    """

    fleet: SharedFleet
    shapes: tuple[Shape, ...]
    kinds: Ints
    devices: Ints
    stages: Ints
    stage_s: Floats
    weight_bytes: Floats
    slo_s: Floats

    @classmethod
    def of(cls, fleet: SharedFleet, shapes: Sequence[Shape] | None = None) -> Tables:
        """The tables of a fleet for its own shapes and any others that are named."""
        every = tuple(sorted({*fleet.shapes, *(shapes or ())}))
        names = sorted(fleet.profiles)
        profiles = [fleet.profiles[name].get(shape) for name in names for shape in every]
        lines = [
            [len(profile.latency_s) for kind in names if (profile := fleet.profiles[kind].get(shape))]
            for shape in every
        ]
        stages = [max(found, default=shape.stages) for found, shape in zip(lines, every, strict=True)]
        width = max(SHORT_STAGES, *stages)
        return cls(
            fleet=fleet,
            shapes=every,
            kinds=np.array([names.index(model.kind) for model in fleet.models], dtype=np.int64),
            devices=np.array([shape.devices for shape in every], dtype=np.int64),
            stages=np.array(stages, dtype=np.int64),
            stage_s=np.array([_stage_row(profile, width) for profile in profiles]),
            weight_bytes=np.array([profile.widest_bytes if profile else np.inf for profile in profiles]),
            slo_s=np.array([model.slo_s for model in fleet.models], dtype=np.float32).astype(np.float64),
        )

    def shape_number(self, shape: Shape) -> int:
        """Column of a shape. Raises `InvalidInput` if nothing was profiled in it."""
        try:
            return self.shapes.index(shape)
        except ValueError:
            raise InvalidInput(f"no model was profiled in shape {shape}; profile it or choose another") from None

    def rows(self) -> Ints:
        """`rows()[m, c]`: the row of model m in shape c."""
        return self.kinds[:, None] * len(self.shapes) + np.arange(len(self.shapes))

    def weights(self) -> Floats:
        """`weights()[m, c]`: bytes that memory rule A charges for model m in shape c."""
        return self.weight_bytes[self.rows()]

    def membership(self, groups: Sequence[Group]) -> tuple[Ints, npt.NDArray[np.uint8]]:
        """Shape numbers of the groups, and a matrix groups × models that says who holds what."""
        members = np.zeros((len(groups), len(self.fleet.models)), dtype=np.uint8)
        for row, group in zip(members, groups, strict=True):
            row[list(group.models)] = 1
        return np.array([self.shape_number(group.shape) for group in groups], dtype=np.int64), members


def _stage_row(profile: StageProfile | None, width: int) -> Floats:
    row = np.zeros(width, dtype=np.float32)
    row[0] = np.inf
    if profile is not None:
        stages = len(profile.latency_s)
        row[:stages] = [latency_s * (1 + STAGE_PENALTY * stages) for latency_s in profile.latency_s]
    return row.astype(np.float64)
