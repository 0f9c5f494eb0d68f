"""In which order to move decoder layers so that devices do not overflow on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from data.layout import ParallelConfig

Role = tuple[int, int]  # (stage, shard)


@dataclass(frozen=True, slots=True)
class LayerOrder:
    """An order of all layers; `limited` tells that the limit put at least one layer off.

    `peak_layers` is the most that any surviving device holds beyond what it started with, in
    whole layers, at any moment of this order.
    """

    order: tuple[int, ...]
    limited: bool
    peak_layers: float


def layer_order(
    layers: int,
    old: ParallelConfig,
    new: ParallelConfig,
    survivors: Sequence[tuple[Role, Role | None]],
    tolerance: float = 0.0,
) -> LayerOrder:
    """SpotServe's memory-aware layer order (ASPLOS'24, Algorithm 2, in the form of its artifact).

    `survivors` are the old and new roles of every device that holds weights now. The next layer is
    the first that keeps every device within `tolerance` times its old share; if none does, the one
    with the smallest resulting maximum, layers that free memory on the fullest devices first.
    """
    change = _changes(layers, old, new, survivors)
    limit = tolerance * (layers / old.stages) / old.shards
    use = np.zeros(len(survivors))
    order: list[int] = []
    waiting, limited = list(range(layers)), False
    while waiting:
        after = use[:, None] + change[:, waiting]
        within = np.asarray((after <= limit + 1e-12).all(axis=0))
        limited = limited or not within[0]
        chosen = int(np.argmax(within)) if within.any() else _least_bad(use, change[:, waiting], after)
        use = after[:, chosen]
        order.append(waiting.pop(chosen))
    return LayerOrder(tuple(order), limited, peak_layers(change, order))


def natural_peak(
    layers: int, old: ParallelConfig, new: ParallelConfig, survivors: Sequence[tuple[Role, Role | None]]
) -> float:
    """`peak_layers` of the order 0, 1, 2, …"""
    return peak_layers(_changes(layers, old, new, survivors), range(layers))


def peak_layers(change: npt.NDArray[np.float64], order: Sequence[int]) -> float:
    """Largest running sum of `change` [device, layer] over devices and time, at least 0."""
    peaks = (max(accumulate((float(row[layer]) for layer in order), initial=0.0)) for row in change)
    return max(peaks, default=0.0)


def _changes(
    layers: int, old: ParallelConfig, new: ParallelConfig, survivors: Sequence[tuple[Role, Role | None]]
) -> npt.NDArray[np.float64]:
    """Layers' worth of memory that each device gains (its new share) and releases (its old share) per layer."""
    change = np.zeros((len(survivors), layers))
    for row, (have, want) in enumerate(survivors):
        if want is not None:
            change[row, slice(*new.stage_layers(want[0], layers))] += 1 / new.shards
        change[row, slice(*old.stage_layers(have[0], layers))] -= 1 / old.shards
    return change


def _least_bad(use: npt.NDArray[np.float64], change: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> int:
    """Column with the smallest maximum (at least 0); among equals those that free the fullest devices, then order."""
    fullest = use >= use.max() - 1e-12
    frees = (change[fullest] < 0).any(axis=0)
    worst = np.maximum(after.max(axis=0), 0.0)
    candidates = [*np.flatnonzero(frees), *np.flatnonzero(~frees)]
    return int(min(candidates, key=lambda column: float(round(worst[column], 9))))
