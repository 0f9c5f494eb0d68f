"""The group partitions and shapes that AlpaServe's Algorithm 2 tries: equal groups, and what is left over."""

from __future__ import annotations

from collections.abc import Iterator

from data.placement import Shape, SharedFleet

MOST_SHARDS = 4
MOST_STAGES = 8


def group_sizes(devices: int, devices_per_node: int) -> Iterator[int]:
    """Powers of two, and beyond a node multiples of it."""
    size = 1
    while size <= devices:
        if size <= devices_per_node or size % devices_per_node == 0:
            yield size
        size *= 2


def uniform_partitions(
    fleet: SharedFleet, devices: int, *, most_shards: int = MOST_SHARDS, most_stages: int = MOST_STAGES
) -> Iterator[tuple[Shape, ...]]:
    """Partitions of `devices` in order of group size, then of stages from few to many.

    Each has as many groups of one shape as go, then for the rest one group (1, 2^b) per set bit b, ascending.
    A shape in which no model was profiled makes no partition.
    """
    known = set(fleet.shapes)
    for size in group_sizes(devices, fleet.devices_per_node):
        for stages in range(1, size + 1):
            shape = Shape(size // stages, stages)
            if size % stages or stages > most_stages or shape.shards > most_shards or shape not in known:
                continue
            yield (shape,) * (devices // size) + tuple(left for left in _leftovers(devices % size) if left in known)


def _leftovers(devices: int) -> Iterator[Shape]:
    for bit in range(devices.bit_length()):
        if devices >> bit & 1:
            yield Shape(1, 1 << bit)
