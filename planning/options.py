"""From layouts with costs to a decision problem: which of them are worth considering, and what changes cost.

Costs are seconds that requests spend in the system per second of operation, that is, how many there are on average
(J. D. C. Little, 1961).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from planning.availability import Process
from planning.policy import Matrix, Problem

Layout = TypeVar("Layout")

NOTHING_S = 3600.0  # what a request that nobody serves is held to wait
PER_COUNT = 3  # layouts kept for each number of instances
_WORTH = 0.002  # of its cost that another replica of a family has to save to be an option


@dataclass(frozen=True, slots=True)
class Option(Generic[Layout]):
    """A layout, what it has in common with those that differ in replicas alone, the instances it needs, its cost."""

    layout: Layout
    family: Hashable
    instances: int
    cost: float


def shortlist(options: Iterable[Option[Layout]], most: int | None = None) -> list[Option[Layout]]:
    """For every number of instances the best few, of every family those that are worth their replicas.

    With `most`, fewer for each number, then only those that beat every smaller one of any family, by more and
    more, until there are at most so many.
    """
    known = sorted(options, key=lambda one: (one.instances, one.cost))
    per_count, worth = PER_COUNT, _WORTH
    kept = _worthwhile(known, per_count, worth)
    while most is not None and len(kept) > most:
        if per_count > 1:
            per_count -= 1
            kept = _worthwhile(known, per_count, worth)
        else:
            kept = _worthwhile(kept, 1, worth, apart=False)
            worth *= 2
    return kept


def _worthwhile(
    known: Sequence[Option[Layout]], per_count: int, worth: float, *, apart: bool = True
) -> list[Option[Layout]]:
    """With `apart`, layouts compete within their family; without, all with each other."""
    best: dict[Hashable, float] = {}
    by_count: dict[int, list[Option[Layout]]] = defaultdict(list)
    for one in known:
        family = one.family if apart else None
        if family not in best or one.cost < best[family] * (1 - worth):
            best[family] = one.cost
            by_count[one.instances].append(one)
    return [one for count in sorted(by_count) for one in sorted(by_count[count], key=lambda one: one.cost)[:per_count]]


def as_problem(process: Process, instances: Sequence[int], serving: Sequence[float], moving: Matrix) -> Problem:
    """The decision problem of a fleet. The first option is to run nothing; `instances` and `serving` include it."""
    fits = np.arange(process.most + 1)[:, None] >= np.array(instances)[None, :]
    return Problem(process.rates(), fits, np.array(serving), moving)


def lost_s(running: float, *, pause_s: float = 0.0, prepare_s: float = 0.0, slowdown: float = 1.0) -> float:
    """Seconds that `running` requests lose by a change: the pause, and slower steps while it is prepared."""
    return running * (pause_s + (slowdown - 1) * prepare_s)
