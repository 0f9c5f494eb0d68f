"""Which device takes which position of the next configuration, so that most of what it holds stays useful."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from data.errors import Infeasible
from data.layout import Device, Layout, ParallelConfig, Position
from data.models import ModelSpec, tensors
from planning.matching import Matrix, matched_value, near_matching
from planning.resharding import Box, kv_extent, layout_boxes, weight_boxes


@dataclass(frozen=True, slots=True)
class MappedLayout:
    """A layout, the new replica that goes on with the requests of every old one, and what it keeps.

    `kept` are `(old replica, new replica)` pairs whose devices and positions are untouched: they
    need no pause. `reused_bytes` counts weights and live KV that are already where they are needed.
    """

    layout: Layout
    inherits: tuple[int, ...]
    kept: tuple[tuple[int, int], ...]
    reused_bytes: int


def assign(
    spec: ModelSpec,
    new: ParallelConfig,
    devices: Sequence[Device],
    *,
    old: Layout | None = None,
    resident: Mapping[Device, Sequence[Box]] | None = None,
    kv_tokens: Sequence[int] = (),
    copies: Mapping[Device, Sequence[Position]] | None = None,
    inherits: Sequence[int] | None = None,
    kv_element_bytes: int | None = None,
    keep_intact: bool = True,
) -> MappedLayout:
    """Bind `new` to `devices` so that the reused bytes of weights and live KV are most.

    `resident` says what devices hold (default: what their position in `old` keeps), `kv_tokens`
    how many tokens are cached in every old replica, `copies` of which old positions' KV devices keep
    copies, `inherits` which new replica goes on with which old one (default: chosen here). With
    `keep_intact`, replicas of unchanged shape whose devices all remain are left alone, even where
    breaking one up would save another's KV.
    Tensor-parallel groups keep to the fewest instances (`near_matching`); among equals a device
    keeps its position. Equal inputs give equal layouts, whatever the order of `devices`. Raises
    `Infeasible` if there are too few devices.
    """
    usable = sorted(set(devices))
    if len(usable) < new.devices:
        raise Infeasible(f"{new} needs {new.devices} devices and {len(usable)} are usable; choose a smaller one")
    known = {**(layout_boxes(spec, old) if old else {}), **(resident or {})}
    values = weight_reuse(spec, new, [known.get(device, ()) for device in usable])
    whole = _whole_replicas(spec, old, new, usable, values) if old and keep_intact else []
    kept = _intact(whole, new, kv_tokens, inherits)
    if inherits is None:
        inherits = _inheritance(old, new, kv_tokens, dict(kept))
    if old is not None:
        kv_bytes = 2 * spec.head_dim * (kv_element_bytes or spec.dtype_bytes)
        values = values + kv_bytes * kv_reuse(spec, old, new, usable, kv_tokens, inherits, copies)
    rows = _fill(values, _preference(old, new, usable), usable, new, _fixed_rows(old, new, usable, kept))
    layout = Layout(new, tuple(usable[row] for row in rows))
    return MappedLayout(layout, tuple(inherits), kept, matched_value(values, rows))


def weight_reuse(spec: ModelSpec, new: ParallelConfig, held: Sequence[Sequence[Box]]) -> Matrix:
    """Bytes of weights that device i already holds of position j; the boxes of a device are disjoint.

    Positions are the same in every replica and devices often hold the same boxes, so each distinct
    pair is worked out once.
    """
    roles = np.stack([
        _extents(spec, weight_boxes(spec, new, position))[0] for position in new.positions() if not position.replica
    ])  # fmt: skip
    distinct = {id(boxes): boxes for boxes in held}
    shared = {key: sum(_overlap(layer, roles) for layer in _extents(spec, boxes)) for key, boxes in distinct.items()}
    values = np.array([shared[id(boxes)] for boxes in held], dtype=np.int64)
    return np.tile(values * spec.dtype_bytes, new.replicas)


@lru_cache(maxsize=16)
def _tensor_index(spec: ModelSpec) -> dict[str, int]:
    return {tensor.name: index for index, tensor in enumerate(tensors(spec))}


def _extents(spec: ModelSpec, boxes: Sequence[Box]) -> list[Matrix]:
    """Boxes as arrays [tensor, dimension, (start, stop)], as many as the most boxes of one tensor."""
    index = _tensor_index(spec)
    rows, depth = [index[box.tensor] for box in boxes], Counter[int]()
    found = np.array([(*_padded(box.start, 0), *_padded(box.stop, 1)) for box in boxes], dtype=np.int64)
    at = np.zeros(len(boxes), dtype=np.int64)
    if len(set(rows)) < len(rows):
        for number, row in enumerate(rows):
            at[number] = depth[row]
            depth[row] += 1
    layers = np.zeros((int(at.max(initial=0)) + 1, len(index), 2, 2), dtype=np.int64)
    layers[at, rows] = found.reshape(len(boxes), 2, 2).transpose(0, 2, 1)
    return list(layers)


def _padded(corner: tuple[int, ...], value: int) -> tuple[int, ...]:
    """A corner of a vector's box as one of a matrix of one column."""
    return corner if len(corner) == 2 else (*corner, value)


def _overlap(layer: Matrix, roles: Matrix) -> Matrix:
    """Elements common to `layer` and each of `roles`."""
    rows = np.flatnonzero(layer[:, 0, 1])
    ours, theirs = layer[rows], roles[:, rows]
    extent = np.minimum(ours[..., 1], theirs[..., 1]) - np.maximum(ours[..., 0], theirs[..., 0])
    overlap: Matrix = np.maximum(extent, 0).prod(axis=-1).sum(axis=-1)
    return overlap


def kv_reuse(
    spec: ModelSpec,
    old: Layout,
    new: ParallelConfig,
    devices: Sequence[Device],
    kv_tokens: Sequence[int],
    inherits: Sequence[int],
    copies: Mapping[Device, Sequence[Position]] | None = None,
) -> Matrix:
    """Live (layer, KV head, token) cells that device i already holds, or keeps copies of, of position j of the new
    replica that goes on with what it holds.
    """
    held = {device: [position] for position, device in old.bound()}
    for device, positions in (copies or {}).items():
        held[device] = [*held.get(device, ()), *positions]
    result = np.zeros((len(devices), new.devices), dtype=np.int64)
    wanted = _cells(spec, new, list(new.positions()))
    replicas = np.array([position.replica for position in new.positions()])
    for row, position in ((row, one) for row, device in enumerate(devices) for one in held.get(device, ())):
        tokens = _tokens(kv_tokens, position.replica)
        if not tokens:
            continue
        (have,) = _cells(spec, old.config, [position])
        extent = np.minimum(have[:, 1], wanted[..., 1]) - np.maximum(have[:, 0], wanted[..., 0])
        cells = np.maximum(extent, 0).prod(axis=-1) * tokens
        result[row] += np.where(replicas == inherits[position.replica], cells, 0)
    return result


def _cells(spec: ModelSpec, config: ParallelConfig, positions: Sequence[Position]) -> Matrix:
    extents = (kv_extent(spec, config, position) for position in positions)
    return np.array([(extent.layers, extent.heads) for extent in extents], dtype=np.int64)


def _whole_replicas(
    spec: ModelSpec, old: Layout, new: ParallelConfig, usable: Sequence[Device], reuse: Matrix
) -> list[int]:
    """Old replicas of the new shape whose devices all remain and hold all that their position needs."""
    if old.config.shape != new.shape:
        return []
    rows = {device: row for row, device in enumerate(usable)}
    needs = [
        spec.dtype_bytes * sum(box.elements for box in weight_boxes(spec, new, position))
        for position in new.positions()
        if not position.replica
    ]
    return [
        replica
        for replica in range(old.config.replicas)
        if all(
            device in rows and reuse[rows[device], column] == needs[column]
            for column, device in enumerate(old.replica_devices(replica))
        )
    ]


def _intact(
    whole: Sequence[int], new: ParallelConfig, kv_tokens: Sequence[int], inherits: Sequence[int] | None
) -> tuple[tuple[int, int], ...]:
    """Untouched replicas and their new numbers: those with most cached tokens, under their own number if free."""
    whole = sorted(sorted(whole, key=lambda r: -_tokens(kv_tokens, r))[: new.replicas])
    if inherits is not None:
        return tuple(sorted({inherits[r]: (r, inherits[r]) for r in reversed(whole)}.values()))
    free = sorted(set(range(new.replicas)) - set(whole))
    return tuple((r, r if r < new.replicas else free.pop(0)) for r in whole)


def _tokens(kv_tokens: Sequence[int], replica: int) -> int:
    return kv_tokens[replica] if replica < len(kv_tokens) else 0


def _inheritance(
    old: Layout | None, new: ParallelConfig, kv_tokens: Sequence[int], kept: Mapping[int, int]
) -> tuple[int, ...]:
    """Kept replicas keep their requests; the others', fullest first, go where fewest tokens are."""
    if old is None:
        return ()
    load = [0] * new.replicas
    chosen = dict(kept)
    for replica, target in kept.items():
        load[target] += 1 + _tokens(kv_tokens, replica)
    rest = (replica for replica in range(old.config.replicas) if replica not in chosen)
    for replica in sorted(rest, key=lambda r: -_tokens(kv_tokens, r)):
        chosen[replica] = min(range(new.replicas), key=lambda target: (load[target], target != replica, target))
        load[chosen[replica]] += 1 + _tokens(kv_tokens, replica)
    return tuple(chosen[replica] for replica in range(old.config.replicas))


def _preference(old: Layout | None, new: ParallelConfig, devices: Sequence[Device]) -> Matrix:
    """2 for a device at its old position, 1 at the same stage and shard of another replica."""
    result = np.zeros((len(devices), new.devices), dtype=np.int64)
    if old is not None:
        held = {device: position for position, device in old.bound()}
        places = {position: column for column, position in enumerate(new.positions())}
        for row, device in enumerate(devices):
            if (position := held.get(device)) is None:
                continue
            for replica in range(new.replicas):
                column = places.get(Position(replica, position.stage, position.shard))
                if column is not None:
                    result[row, column] = 2 if replica == position.replica else 1
    return result


def _fixed_rows(
    old: Layout | None, new: ParallelConfig, devices: Sequence[Device], kept: Sequence[tuple[int, int]]
) -> dict[int, int]:
    """Row of every column that a kept replica settles."""
    if old is None:
        return {}
    rows = {device: row for row, device in enumerate(devices)}
    return {
        replica * new.replica_devices + offset: rows[device]
        for before, replica in kept
        for offset, device in enumerate(old.replica_devices(before))
    }


def _fill(
    values: Matrix, preference: Matrix, devices: Sequence[Device], new: ParallelConfig, fixed: Mapping[int, int]
) -> list[int]:
    """The row of every column: the fixed ones, and the best matching of what is left."""
    rows = np.setdiff1d(np.arange(len(devices)), list(fixed.values()))
    columns = np.setdiff1d(np.arange(new.devices), list(fixed))
    result = dict(fixed)
    if len(columns):
        free: npt.NDArray[np.intp] = np.ix_(rows, columns)  # type: ignore[assignment]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(device.instance for device in devices))}
        instances = [numbers[devices[row].instance] for row in rows]
        groups = [int(column) // new.shards for column in columns]
        matched = near_matching(values[free], preference[free], instances, groups)
        result |= {int(column): int(rows[row]) for column, row in zip(columns, matched, strict=True)}
    return [result[column] for column in range(new.devices)]
