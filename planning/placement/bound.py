"""How much any placement could attain at most: a linear program over replicas, groups and served requests.

What it keeps: memory rule A per shape, one replica of a model per group, the devices of the fleet, and every model's
SLO with its real arrivals: what r replicas serve in time with nothing beside them, and what g groups serve of a kind
with nothing else on them, both exact; and the time of the slowest stages in intervals of many lengths.

What it relaxes: groups and replicas may be fractions, groups of a shape pool their memory, which models a group holds
matters only for memory, kinds share time as a fluid, and in intervals work may go on after the end by the longest
SLO. A bound on the trimmed attainment treats the trimmed trace as all there is, since what came before can only keep
devices busy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from data.placement import Arrivals, HostedModel
from planning.placement.dedicated import good_alone
from planning.placement.partitions import uniform_partitions
from planning.placement.problem import Problem
from planning.placement.uniform import UniformSearch
from planning.simulation.requests import TRIM_S
from planning.simulation.tables import Floats, Ints

_WINDOWS = 256
_WINDOWS_OF_MANY_KINDS = 64  # keeps the program at seconds
_MOST_REPLICAS = 64


@dataclass(frozen=True)
class Bound:
    """No placement attains more than `attainment`; `memory_only` is what would be left without limits of time.

    `uniform` bounds placements in equal groups of one shape (and leftovers), which are nearly all that is published;
    it is close where models are of one kind, and takes what single models gain from replicas to be concave.
    """

    attainment: float
    memory_only: float
    uniform: float


def bound(problem: Problem, trim_s: float = TRIM_S) -> Bound:
    """An upper bound on the attainment that any placement reaches on the problem's trace."""
    begin, end = problem.arrivals.trimmed(trim_s)
    core = problem.arrivals.part(begin, end) if end > begin else problem.arrivals
    trimmed = Problem(problem.fleet, core)
    full, alone = (_Program(trimmed, timed=timed).most_served() for timed in (True, False))
    partitions = list(uniform_partitions(problem.fleet, problem.fleet.devices))
    uniform = UniformSearch.of(trimmed, partitions, trimmed.everyone, worth_bounding=0.0).bound
    requests = max(len(core), 1)
    return Bound(min(1.0, full / requests), min(1.0, alone / requests), min(1.0, uniform))


@dataclass(frozen=True)
class _Pieces:
    """Concave gains: a further `width` of replicas of `model` in `shape` serves at most `width * slope` more."""

    model: Ints
    shape: Ints
    width: Floats
    slope: Floats

    @classmethod
    def of(cls, problem: Problem) -> _Pieces:
        rows: list[tuple[int, int, float, float]] = []
        fleet, tables = problem.fleet, problem.tables
        for shape, devices in enumerate(tables.devices):
            whole = fleet.whole_nodes(tables.shapes[shape])
            groups = int(min(fleet.devices // devices, _MOST_REPLICAS)) if whole else 0
            for model in range(len(fleet.models)) if groups else ():
                if problem.costs.weights[model, shape] <= fleet.budget_bytes:
                    served = _served(problem, model, shape, groups)
                    rows += [(model, shape, *piece) for piece in _concave(served)]
        table = np.array(rows, dtype=float).reshape(-1, 4)
        return cls(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2], table[:, 3])

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Every (model, shape) that gains anything."""
        return sorted(set(zip(self.model.tolist(), self.shape.tolist(), strict=True)))

    def of_shape(self, shape: int) -> list[int]:
        """Numbers of the pieces of a shape."""
        return [int(number) for number in np.flatnonzero(self.shape == shape)]


def _served(problem: Problem, model: int, shape: int, groups: int) -> list[float]:
    """Served by 0, 1, … replicas; at the end all requests, if more replicas than are looked at could be had."""
    requests = float(problem.trace.begin[model + 1] - problem.trace.begin[model])
    served = [0.0]
    for replicas in range(1, groups + 1):
        served.append(float(good_alone(problem.costs, problem.trace, model, shape, replicas)))
        if served[-1] in (requests, 0.0):
            return served
    if groups == _MOST_REPLICAS:
        served[-1] = requests
    return served


def _concave(served: list[float]) -> list[tuple[float, float]]:
    """(width, slope) of the pieces of the least concave function above the values."""
    pieces, at = [], 0
    while at + 1 < len(served):
        slopes = [(served[to] - served[at]) / (to - at) for to in range(at + 1, len(served))]
        step = max(range(len(slopes)), key=lambda index: (slopes[index], index)) + 1
        if slopes[step - 1] <= 0:
            break
        pieces.append((float(step), slopes[step - 1]))
        at += step
    return pieces


class _Program:
    """Columns: groups per shape, parts of pieces, and requests served per (model, shape)."""

    def __init__(self, problem: Problem, *, timed: bool) -> None:
        self._problem, self._timed = problem, timed
        self._alone, self._by_kind = _Pieces.of(problem), _Pieces.of(_one_model_per_kind(problem))
        self._rows: list[tuple[list[tuple[int, float]], float]] = []
        self._most: list[float] = []
        self._gain: list[float] = []

    def most_served(self) -> float:
        """The optimum. Every row says: sum of entries <= limit."""
        tables = self._problem.tables
        self._groups = [self._column() for _ in tables.shapes]
        self._rows.append(
            ([(self._groups[s], float(d)) for s, d in enumerate(tables.devices)], self._problem.fleet.devices)
        )
        parts = [self._column(most=width) for width in self._alone.width]
        self._memory_rows(parts)
        self._served = self._served_rows(parts)
        if self._timed:
            self._line_rows()
            self._window_rows()
        return self._solve()

    def _column(self, most: float = np.inf, gain: float = 0.0) -> int:
        self._most.append(most)
        self._gain.append(gain)
        return len(self._most) - 1

    def _memory_rows(self, parts: list[int]) -> None:
        """Per shape: bytes of replicas within those of groups. Per model and shape: no more replicas than groups."""
        costs, budget_bytes = self._problem.costs, self._problem.fleet.budget_bytes
        for shape, group in enumerate(self._groups):
            pieces = self._alone.of_shape(shape)
            shares = [(parts[n], costs.weights[self._alone.model[n], shape] / budget_bytes) for n in pieces]
            self._rows.append(([*shares, (group, -1.0)], 0.0))
            for model in {int(self._alone.model[n]) for n in pieces}:
                held = [(parts[n], 1.0) for n in pieces if self._alone.model[n] == model]
                self._rows.append(([*held, (group, -1.0)], 0.0))

    def _served_rows(self, parts: list[int]) -> dict[tuple[int, int], int]:
        """Per model and shape: no more served than the replicas can. Per model: no more than arrive."""
        served: dict[tuple[int, int], int] = {}
        counts = self._problem.arrivals.counts(len(self._problem.fleet.models))
        for model, shape in self._alone.pairs:
            served[model, shape] = self._column(float(counts[model]), 1.0)
            pieces = [n for n in self._alone.of_shape(shape) if self._alone.model[n] == model]
            most = [(parts[n], -float(self._alone.slope[n])) for n in pieces]
            self._rows.append(([(served[model, shape], 1.0), *most], 0.0))
        for model, count in enumerate(counts):
            columns = [(column, 1.0) for (other, _), column in served.items() if other == model]
            self._rows.append((columns, float(count)))
        return served

    def _line_rows(self) -> None:
        """Per kind and shape: no more served than the groups could if they served and held nothing else."""
        parts = [self._column(most=width) for width in self._by_kind.width]
        for kind, shape in self._by_kind.pairs:
            pieces = [n for n in self._by_kind.of_shape(shape) if self._by_kind.model[n] == kind]
            most = [(parts[n], -float(self._by_kind.slope[n])) for n in pieces]
            self._rows.append(([*self._of_kind(kind, shape), *most], 0.0))
            self._rows.append(([*((parts[n], 1.0) for n in pieces), (self._groups[shape], -1.0)], 0.0))

    def _of_kind(self, kind: int, shape: int) -> list[tuple[int, float]]:
        kinds = self._problem.tables.kinds
        return [
            (column, 1.0) for (model, other), column in self._served.items() if other == shape and kinds[model] == kind
        ]

    def _window_rows(self) -> None:
        """Kinds together: in every interval, work of the slowest stages within it and the longest SLO after it."""
        kinds = range(len(self._problem.fleet.profiles))
        counts, length_s = _window_counts(self._problem)
        pairs = self._by_kind.pairs
        columns = {
            (kind, shape): [self._column(float(count)) for count in counts[kind]] for kind, shape in pairs
        }  # fmt: skip
        for (kind, shape), windows in columns.items():
            self._rows.append(([*self._of_kind(kind, shape), *((column, -1.0) for column in windows)], 0.0))
        for kind in kinds:
            for window, count in enumerate(counts[kind]):
                here = [(windows[window], 1.0) for (other, _), windows in columns.items() if other == kind]
                self._rows.append((here, float(count)))
        for shape in {shape for _, shape in pairs}:
            self._interval_rows(shape, {kind: columns[kind, s] for kind, s in pairs if s == shape}, length_s)

    def _interval_rows(self, shape: int, columns: dict[int, list[int]], length_s: float) -> None:
        costs, kinds = self._problem.costs, self._problem.tables.kinds
        rows = {kind: kind * len(self._problem.tables.shapes) + shape for kind in columns}
        slo_s = {kind: float(costs.slo_s[kinds == kind].max()) for kind in columns}
        after_s = max(slo_s[k] - costs.line_s[rows[k]] + costs.slowest_s[rows[k]] for k in columns)
        size, windows = 1, len(next(iter(columns.values())))
        while size <= windows:
            for begin in range(0, windows, size):
                seconds = size * length_s + after_s
                work = [
                    (column, costs.slowest_s[rows[kind]] / seconds)
                    for kind, windows in columns.items()
                    for column in windows[begin : begin + size]
                ]
                self._rows.append(([*work, (self._groups[shape], -1.0)], 0.0))
            size *= 4

    def _solve(self) -> float:
        entries = [(row, *entry) for row, (columns, _) in enumerate(self._rows) for entry in columns]
        rows, columns, values = (np.array(column) for column in zip(*entries, strict=True))
        matrix = coo_array((values, (rows, columns)), shape=(len(self._rows), len(self._most))).tocsr()
        limits = [(0.0, most) for most in self._most]
        result = linprog(
            -np.array(self._gain),
            A_ub=matrix,
            b_ub=[limit for _, limit in self._rows],
            bounds=limits,
            method="highs-ipm",
        )
        return float(-result.fun)


def _one_model_per_kind(problem: Problem) -> Problem:
    """Every kind as a single model, with the most generous SLO among its models."""
    fleet, kinds = problem.fleet, problem.tables.kinds
    slos = [max((m.slo_s for m in fleet.models if m.kind == name), default=1.0) for name in sorted(fleet.profiles)]
    models = tuple(
        HostedModel(name, name, slo_s, 1.0, 1.0) for name, slo_s in zip(sorted(fleet.profiles), slos, strict=True)
    )
    return Problem(
        replace(fleet, models=models), Arrivals.of(problem.arrivals.times_s, kinds[problem.arrivals.models])
    )  # fmt: skip


def _window_counts(problem: Problem) -> tuple[Ints, float]:
    """Requests per kind and window, and the seconds of a window."""
    arrivals = problem.arrivals
    windows = _WINDOWS if len(problem.fleet.profiles) == 1 else _WINDOWS_OF_MANY_KINDS
    length_s = max(arrivals.span_s / windows, 1e-9)
    window = np.minimum((arrivals.times_s - arrivals.times_s[0]) / length_s, windows - 1).astype(np.int64)
    counts = np.zeros((len(problem.fleet.profiles), windows), dtype=np.int64)
    np.add.at(counts, (problem.tables.kinds[arrivals.models], window), 1)
    return counts, length_s
