"""Random changes of a placement, as proposals of a local search: who is held where, and which devices form a group."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from planning.simulation.board import Board, Costs
from planning.simulation.compiled import compiled
from planning.simulation.requests import Bytes
from planning.simulation.tables import Floats, Ints

MOST_TOUCHED = 3


class Layout(NamedTuple):
    """Groups that may be unused: `used` says which are, `room` how many bytes rule A leaves in each.

    `devices` is per shape, 0 for shapes that may not be used. The rest is working memory: the groups that the last
    proposal touched (`touched[0]` says how many), and what they were before.
    """

    used: Bytes
    room: Floats
    devices: Ints
    touched: Ints
    old_members: Bytes
    old_shape: Ints
    old_used: Bytes
    old_room: Floats


def layout_of(board: Board, costs: Costs, devices: Ints, budget_bytes: float) -> Layout:
    """The layout of a board whose groups with shape -1 are unused (and given shape 0)."""
    used = (board.shape >= 0).astype(np.uint8)
    board.shape[board.shape < 0] = 0
    held = np.where(board.members.astype(bool), costs.weights[:, board.shape].T, 0.0)
    models = board.members.shape[1]
    return Layout(
        used=used,
        room=budget_bytes - held.sum(axis=1),
        devices=devices,
        touched=np.zeros(MOST_TOUCHED + 1, dtype=np.int64),
        old_members=np.zeros((MOST_TOUCHED, models), dtype=np.uint8),
        old_shape=np.zeros(MOST_TOUCHED, dtype=np.int64),
        old_used=np.zeros(MOST_TOUCHED, dtype=np.uint8),
        old_room=np.zeros(MOST_TOUCHED),
    )


@compiled
def touch(board: Board, layout: Layout, group: int) -> None:
    """Remember the group as it is, before it is changed."""
    number = layout.touched[0]
    layout.touched[number + 1] = group
    layout.old_members[number] = board.members[group]
    layout.old_shape[number] = board.shape[group]
    layout.old_used[number] = layout.used[group]
    layout.old_room[number] = layout.room[group]
    layout.touched[0] = number + 1


@compiled
def undo(board: Board, layout: Layout) -> None:
    """Put every touched group back as it was."""
    for number in range(layout.touched[0]):
        group = layout.touched[number + 1]
        board.members[group] = layout.old_members[number]
        board.shape[group] = layout.old_shape[number]
        layout.used[group] = layout.old_used[number]
        layout.room[group] = layout.old_room[number]


@compiled
def _any_group(layout: Layout, but: int) -> int:
    """A used group other than `but`; -1 if there is none."""
    count, chosen = 0, -1
    for group in range(layout.used.shape[0]):
        if layout.used[group] and group != but:
            count += 1
            if np.random.randint(count) == 0:
                chosen = group
    return chosen


@compiled
def _any_shape(layout: Layout, devices: int, but: int) -> int:
    """A shape of so many devices other than `but`; -1 if there is none."""
    count, chosen = 0, -1
    for shape in range(layout.devices.shape[0]):
        if layout.devices[shape] == devices and shape != but:
            count += 1
            if np.random.randint(count) == 0:
                chosen = shape
    return chosen


@compiled
def _wanted(board: Board, unserved: Ints, group: int) -> int:
    """A model that the group lacks, with probability in step with its unserved requests + 1; -1 if it lacks none."""
    total, chosen = 0.0, -1
    for model in range(unserved.shape[0]):
        if not board.members[group, model]:
            weight = unserved[model] + 1.0
            total += weight
            if np.random.random() * total < weight:
                chosen = model
    return chosen


@compiled
def _held(board: Board, group: int) -> int:
    """Any model of the group; -1 if it is empty."""
    count, chosen = 0, -1
    for model in range(board.members.shape[1]):
        if board.members[group, model]:
            count += 1
            if np.random.randint(count) == 0:
                chosen = model
    return chosen


@compiled
def _put(costs: Costs, board: Board, layout: Layout, group: int, model: int) -> None:
    board.members[group, model] = 1
    layout.room[group] -= costs.weights[model, board.shape[group]]


@compiled
def _take(costs: Costs, board: Board, layout: Layout, group: int, model: int) -> None:
    board.members[group, model] = 0
    layout.room[group] += costs.weights[model, board.shape[group]]


@compiled
def _make_room(costs: Costs, board: Board, layout: Layout, group: int, bytes_needed: float) -> bool:
    """Drop any models of the group until so much is free; false if even an empty group has not so much."""
    while layout.room[group] < bytes_needed:
        model = _held(board, group)
        if model < 0:
            return False
        _take(costs, board, layout, group, model)
    return True


@compiled
def _fill(costs: Costs, board: Board, layout: Layout, unserved: Ints, group: int, tries: int) -> None:
    for _ in range(tries):
        model = _wanted(board, unserved, group)
        if model >= 0 and unserved[model] and costs.weights[model, board.shape[group]] <= layout.room[group]:
            _put(costs, board, layout, group, model)


@compiled
def _reform(
    costs: Costs, board: Board, layout: Layout, unserved: Ints, budget_bytes: float, group: int, shape: int
) -> bool:  # fmt: skip
    """Give a group another shape; models that no longer fit go, others come. False if it is left empty."""
    board.shape[group] = shape
    layout.used[group] = 1
    layout.room[group] = budget_bytes
    for model in np.random.permutation(board.members.shape[1]):
        if board.members[group, model]:
            board.members[group, model] = 0
            if costs.weights[model, shape] <= layout.room[group]:
                _put(costs, board, layout, group, model)
    _fill(costs, board, layout, unserved, group, 8)
    return bool(layout.room[group] < budget_bytes)


@compiled
def _bring(costs: Costs, board: Board, layout: Layout, unserved: Ints) -> bool:
    group = _any_group(layout, -1)
    model = _wanted(board, unserved, group)
    if model < 0:
        return False
    touch(board, layout, group)
    if not _make_room(costs, board, layout, group, costs.weights[model, board.shape[group]]):
        return False
    _put(costs, board, layout, group, model)
    if np.random.random() < 0.5:
        _fill(costs, board, layout, unserved, group, 2)
    return True


@compiled
def _drop(costs: Costs, board: Board, layout: Layout) -> bool:
    group = _any_group(layout, -1)
    model = _held(board, group)
    if model < 0:
        return False
    touch(board, layout, group)
    _take(costs, board, layout, group, model)
    return True


@compiled
def _exchange(costs: Costs, board: Board, layout: Layout, both: bool) -> bool:
    """Move a model to another group, or swap two."""
    source = _any_group(layout, -1)
    target = _any_group(layout, source)
    if target < 0:
        return False
    model, other = _held(board, source), _held(board, target)
    if model < 0 or board.members[target, model]:
        return False
    swap = both and other >= 0 and not board.members[source, other]
    touch(board, layout, source)
    touch(board, layout, target)
    _take(costs, board, layout, source, model)
    if swap:
        _take(costs, board, layout, target, other)
        if not _make_room(costs, board, layout, source, costs.weights[other, board.shape[source]]):
            return False
        _put(costs, board, layout, source, other)
    if not _make_room(costs, board, layout, target, costs.weights[model, board.shape[target]]):
        return False
    _put(costs, board, layout, target, model)
    return True


@compiled
def _reshape(costs: Costs, board: Board, layout: Layout, unserved: Ints, budget_bytes: float) -> bool:
    group = _any_group(layout, -1)
    shape = _any_shape(layout, layout.devices[board.shape[group]], board.shape[group])
    if shape < 0:
        return False
    touch(board, layout, group)
    return _reform(costs, board, layout, unserved, budget_bytes, group, shape)


@compiled
def _unused(layout: Layout) -> int:
    for group in range(layout.used.shape[0]):
        if not layout.used[group]:
            return group
    return -1


@compiled
def _split(costs: Costs, board: Board, layout: Layout, unserved: Ints, budget_bytes: float) -> bool:
    group, fresh = _any_group(layout, -1), _unused(layout)
    devices = layout.devices[board.shape[group]]
    if fresh < 0 or devices < 2:
        return False
    part = np.random.randint(1, devices)
    first, second = _any_shape(layout, devices - part, -1), _any_shape(layout, part, -1)
    if first < 0 or second < 0:
        return False
    touch(board, layout, group)
    touch(board, layout, fresh)
    board.members[fresh] = board.members[group]
    for model in range(board.members.shape[1]):
        if board.members[group, model]:
            board.members[group if np.random.random() < 0.5 else fresh, model] = 0
    kept = _reform(costs, board, layout, unserved, budget_bytes, group, first)
    return _reform(costs, board, layout, unserved, budget_bytes, fresh, second) and kept


@compiled
def _merge(costs: Costs, board: Board, layout: Layout, unserved: Ints, budget_bytes: float) -> bool:
    group = _any_group(layout, -1)
    other = _any_group(layout, group)
    if other < 0:
        return False
    devices = layout.devices[board.shape[group]] + layout.devices[board.shape[other]]
    shape = _any_shape(layout, devices, -1)
    if shape < 0:
        return False
    touch(board, layout, group)
    touch(board, layout, other)
    board.members[group] = board.members[group] | board.members[other]
    board.members[other] = 0
    layout.used[other] = 0
    layout.room[other] = budget_bytes
    return _reform(costs, board, layout, unserved, budget_bytes, group, shape)


@compiled
def _use_idle(costs: Costs, board: Board, layout: Layout, unserved: Ints, budget_bytes: float, devices: int) -> bool:
    """Make a group of devices that no group uses."""
    fresh, idle = _unused(layout), devices
    for group in range(layout.used.shape[0]):
        if layout.used[group]:
            idle -= layout.devices[board.shape[group]]
    if idle < 1 or fresh < 0:
        return False
    shape = _any_shape(layout, np.random.randint(1, idle + 1), -1)
    if shape < 0:
        return False
    touch(board, layout, fresh)
    board.members[fresh] = 0
    return _reform(costs, board, layout, unserved, budget_bytes, fresh, shape)


@compiled
def propose(
    costs: Costs, board: Board, layout: Layout, unserved: Ints, budget_bytes: float, devices: int, structural: float
) -> bool:  # fmt: skip
    """Change at most three groups at random; false if the change is none, or not one to try (then `undo` it).

    A share `structural` of the proposals changes which devices form groups, and in which shape.
    """
    layout.touched[0] = 0
    if np.random.random() < structural:
        kind = np.random.randint(4)
        if kind == 0:
            return _split(costs, board, layout, unserved, budget_bytes)
        if kind == 1:
            return _merge(costs, board, layout, unserved, budget_bytes)
        if kind == 2:
            return _reshape(costs, board, layout, unserved, budget_bytes)
        return _use_idle(costs, board, layout, unserved, budget_bytes, devices)
    draw = np.random.random()
    if draw < 0.6:
        return _bring(costs, board, layout, unserved)
    if draw < 0.95:
        return _exchange(costs, board, layout, draw < 0.85)
    return _drop(costs, board, layout)
