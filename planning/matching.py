"""Maximum-weight one-to-one matchings of devices (rows) to positions (columns).

Values are integers (bytes), so optima are exact; `preference` only decides among equal optima.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, groupby, product

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from data.errors import Infeasible

Matrix = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float64]

# Pairwise exchanges tried after the hierarchical matching; bounds its time at 128 devices.
_EXCHANGES = 400
# Choices of instances for every group up to which all of them are looked at.
_CHOICES = 4096


def best_matching(values: Matrix, preference: Matrix | None = None) -> list[int]:
    """The row matched to every column so that the sum of `values` is largest, then that of `preference`.

    Kuhn–Munkres, as solved by scipy. Needs at least as many rows as columns, else `Infeasible`.
    """
    _check(values)
    return _match(_scores(values, preference))


def near_matching(
    values: Matrix, preference: Matrix | None, instances: Sequence[int], groups: Sequence[int]
) -> list[int]:
    """As `best_matching`, with the columns of every group on as few instances as possible.

    `instances[row]` is the instance of a device, `groups[column]` the tensor-parallel group of a
    position; groups have equal sizes. Inside its instances a group may take any devices: shards
    may interleave, where SpotServe (ASPLOS'24, §3.3) deals contiguous blocks. The result is the
    free optimum whenever that keeps to the fewest instances; otherwise, in small problems, the best
    over all choices of instances, and in large ones groups are matched to instances and improved
    by exchanges.
    """
    _check(values)
    problem = _Grouped(_scores(values, preference), np.asarray(instances), np.asarray(groups))
    free = _match(problem.scores)
    if problem.spans(free) == problem.fewest_spans:
        return free
    near = problem.match_exactly() if problem.choices <= _CHOICES else problem.match()
    return near if problem.spans(near) < problem.spans(free) else free


def matched_value(values: Matrix, rows: Sequence[int]) -> int:
    """Sum of `values` over the matching `rows`."""
    return int(values[list(rows), np.arange(values.shape[1])].sum())


def _check(values: Matrix) -> None:
    if values.shape[0] < values.shape[1]:
        raise Infeasible(f"{values.shape[1]} positions need as many devices; there are {values.shape[0]}")


def _scores(values: Matrix, preference: Matrix | None) -> Scores:
    """One score whose order is lexicographic: value, then preference. Exact below 2**53."""
    unit = int(np.gcd.reduce(values, axis=None)) or 1
    if preference is None:
        preference = np.zeros_like(values)
    scale = int(preference.max(initial=0)) * values.shape[1] + 1
    scores: Scores = (values // unit * scale + preference).astype(np.float64)
    return scores


def _match(scores: Scores) -> list[int]:
    rows, columns = linear_sum_assignment(scores, maximize=True)
    result = np.empty(scores.shape[1], dtype=np.int64)
    result[columns] = rows
    return [int(row) for row in result]


class _Grouped:
    """One matching problem whose columns come in groups and whose rows in instances."""

    def __init__(self, scores: Scores, instances: npt.NDArray[np.int64], groups: npt.NDArray[np.int64]) -> None:
        self.scores = scores
        self.instances = instances
        self.members = [np.flatnonzero(instances == instance) for instance in np.unique(instances)]
        self.columns = [np.flatnonzero(groups == group) for group in np.unique(groups)]
        self.group_size = max((len(columns) for columns in self.columns), default=1)
        self.largest = max((len(members) for members in self.members), default=1)
        self.per_group = -(-self.group_size // self.largest)
        self.fewest_spans = self.per_group * len(self.columns)
        self._highest = float(scores.max(initial=0.0))
        self._values: dict[tuple[tuple[int, ...], bytes], float] = {}  # of blocks: many are alike

    def spans(self, rows: Sequence[int]) -> int:
        """Instances touched, summed over groups."""
        chosen = self.instances[list(rows)]
        return sum(len(np.unique(chosen[columns])) for columns in self.columns)

    @property
    def choices(self) -> int:
        """Upper bound on the ways to choose a set of instances for every group."""
        return int(min(2 ** (len(self.members) * len(self.columns)), _CHOICES + 1))

    def match_exactly(self) -> list[int]:
        """The best matching among those that touch the fewest instances, by trying every choice of them."""
        sizes = [len(members) for members in self.members]
        sets = [
            chosen
            for count in range(1, len(sizes) + 1)
            for chosen in combinations(range(len(sizes)), count)
            if sum(sizes[instance] for instance in chosen) >= self.group_size
        ]
        every = sorted(product(sets, repeat=len(self.columns)), key=lambda choice: sum(map(len, choice)))
        for _, alike in groupby(every, key=lambda choice: sum(map(len, choice))):
            matchings = [rows for choice in alike if (rows := self._within(choice)) is not None]
            if matchings:
                return max(matchings, key=lambda rows: float(self.scores[rows, range(len(rows))].sum()))
        return self.match()

    def _within(self, choice: Sequence[tuple[int, ...]]) -> list[int] | None:
        """The best matching with each group inside its chosen instances, or None if there is none."""
        allowed = np.full(self.scores.shape, -np.inf)
        for chosen, columns in zip(choice, self.columns, strict=True):
            cells = np.ix_(np.concatenate([self.members[instance] for instance in chosen]), columns)
            allowed[cells] = self.scores[cells]
        try:
            return _match(allowed)
        except ValueError:  # how scipy says that no complete matching exists
            return None

    def match(self) -> list[int]:
        """Match groups to instances by the value of their best inner matching, then devices inside."""
        pairs = self._place_groups()
        pairs = self._exchange(pairs)
        return self._complete([pair for block in self._blocks(pairs) for pair in self._inner(*block)])

    def _place_groups(self) -> list[tuple[int, int]]:
        """(instance, group) pairs; covering more positions comes before any value."""
        worth = np.array([[self._worth(members, columns) for columns in self.columns] for members in self.members])
        slots = np.repeat(np.arange(len(self.members)), [self._capacity(len(members)) for members in self.members])
        copies = np.repeat(np.arange(len(self.columns)), self.per_group)
        rows, columns = linear_sum_assignment(worth[np.ix_(slots, copies)], maximize=True)
        return [(int(slots[row]), int(copies[column])) for row, column in zip(rows, columns, strict=True)]

    def _capacity(self, members: int) -> int:
        return members // self.group_size if self.group_size <= self.largest else 1

    def _worth(self, members: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> float:
        covered = min(len(members), len(columns))
        return self._value(members, columns) + covered * (1.0 + self._highest * self.group_size)

    def _value(self, members: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> float:
        inner = self.scores[members[:, None], columns]
        key = inner.shape, inner.tobytes()
        if key not in self._values:
            self._values[key] = float(inner[linear_sum_assignment(inner, maximize=True)].sum())
        return self._values[key]

    def _block_values(self, pairs: Sequence[tuple[int, int]]) -> float:
        """The value of all blocks of some pairs."""
        return sum(self._value(*self._block(block)) for block in self._apart(pairs))

    def _blocks(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Independent (rows, columns) problems: one per instance, or one per group that spans several."""
        return [self._block(block) for block in self._apart(pairs)]

    def _apart(self, pairs: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        axis = 0 if self.per_group == 1 else 1
        return [[pair for pair in pairs if pair[axis] == key] for key in sorted({pair[axis] for pair in pairs})]

    def _block(self, pairs: Sequence[tuple[int, int]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        members = np.concatenate([self.members[instance] for instance in sorted({pair[0] for pair in pairs})])
        columns = np.concatenate([self.columns[group] for group in sorted({pair[1] for pair in pairs})])
        return members, columns

    def _inner(self, members: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
        rows, matched = linear_sum_assignment(self.scores[np.ix_(members, columns)], maximize=True)
        return [(int(members[row]), int(columns[column])) for row, column in zip(rows, matched, strict=True)]

    def _exchange(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Swap the groups of two pairs while that helps: groups that meet in a block compete for devices."""
        if self._capacity(self.largest) == 1 and self.per_group == 1:
            return pairs  # every block is one group on one instance: already optimal
        tried, improved = 0, True
        while improved and tried < _EXCHANGES:
            improved = False
            for one, other in combinations(range(len(pairs)), 2):
                if pairs[one][0] == pairs[other][0] or pairs[one][1] == pairs[other][1]:
                    continue
                tried += 1
                swapped = self._swapped(pairs, one, other)
                if swapped is not None:
                    pairs, improved = swapped, True
                if tried >= _EXCHANGES:
                    break
        return pairs

    def _swapped(self, pairs: list[tuple[int, int]], one: int, other: int) -> list[tuple[int, int]] | None:
        result = list(pairs)
        result[one], result[other] = (pairs[one][0], pairs[other][1]), (pairs[other][0], pairs[one][1])
        axis = 0 if self.per_group == 1 else 1
        touched = {pairs[one][axis], pairs[other][axis]}
        before, after = (
            self._block_values([pair for pair in version if pair[axis] in touched]) for version in (pairs, result)
        )
        return result if after > before else None

    def _complete(self, found: Sequence[tuple[int, int]]) -> list[int]:
        """Give positions that no block covered the devices that no block used."""
        result = {column: row for row, column in found}
        rows = np.setdiff1d(np.arange(self.scores.shape[0]), list(result.values()))
        columns = np.setdiff1d(np.arange(self.scores.shape[1]), list(result))
        result |= {column: row for row, column in self._inner(rows, columns)}
        return [result[column] for column in range(self.scores.shape[1])]
