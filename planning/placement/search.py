"""This project's placement search: any groups, any shapes, judged on the trace that came and on some that might come.

It starts from the best of AlpaServe's policies on the given trace and climbs by small random changes, each of which
is simulated as far as it reaches. A change is kept if the weighted attainment over the given trace and a few drawn
futures is no lower, and the attainment on the given trace stays at or above that of every policy it started from.
At last other futures, which the climb has not seen, say whether anything was gained; if not, the start it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from data.placement import Arrivals, Placement
from planning.placement.baselines import sr_greedy
from planning.placement.beam import promising_beam
from planning.placement.buckets import mp_search_sep
from planning.placement.climb import Goal, Record, climb, measure
from planning.placement.futures import future, measured_drift, one_after_the_other
from planning.placement.moves import Layout, layout_of
from planning.placement.problem import Problem
from planning.simulation.board import Board, Trace, board_of, placement_of, trace_of
from planning.simulation.requests import TRIM_S, replay
from planning.simulation.tables import Floats

Clock = Callable[[], float]

_FUTURE_S = 300.0  # long traces make room for more futures, not for longer ones
_MOST_FUTURES, _REPLAYS_PER_FUTURE = 12, 500  # lengths of the given trace; more only if time allows
_PAUSE_S = 1000.0  # between traces, so that every group is idle
_ROUND = 50  # proposals between looks at the clock
_STRUCTURAL = 0.15
_SLACK = 0.01  # a proposal that is that share of requests behind is given up early
_SHARE = 0.25  # of the time, at most, for the beam
_TRAIN_SHARE = 0.3  # of the objective, the rest being the futures
_CLIMBED_PER_S = 50e6  # requests that a climb simulates, about
_REQUESTS_PER_S = 20e6  # a cautious guess at what a beam simulates
_UNSEEN = 8  # futures that the climb does not see
_UNSEEN_SEED = 1_000_000_000
_REHEARSED, _LOOKS = 300, 30  # requests, and looks at the clock
_PATIENCE = 4000  # proposals without success after which the climb starts again


@dataclass(frozen=True)
class Searched:
    """The best placement with its attainment on the given trace (both ends trimmed), and the effort.

    `simulated` requests were simulated in `climbing_s`, where replaying all traces for each proposal would have meant
    `proposals` × `trace_requests`.
    """

    placement: Placement
    attainment: float
    start: str
    proposals: int
    accepted: int
    simulated: int
    climbs: int
    climbing_s: float
    trace_requests: int


def search(problem: Problem, clock: Clock, budget_s: float, seed: int = 0) -> Searched:
    """The best placement found until `clock()` has advanced by `budget_s` seconds; the start alone if that is little.

    More time never gives a lower objective for the same seed. The clock is looked at every few milliseconds.
    """
    deadline_s = clock() + budget_s
    name, start = max(
        _starts(problem, clock, clock() + _SHARE * budget_s), key=lambda one: _attainment(problem, one[1])
    )
    unseen = _unseen(problem, seed) if clock() < deadline_s else []
    judging_s = clock()
    before = _attainments(problem, start, unseen)
    deadline_s -= clock() - judging_s  # what is found takes as long to judge
    climber = _Climber(problem, start, budget_s, seed)
    started_s = clock()
    while clock() < deadline_s:
        climber.advance()
    climbing_s = clock() - started_s
    climbed = climber.best_placement
    best = climbed if _gained(before, _attainments(problem, climbed, unseen)) else start
    return Searched(best, _attainment(problem, best), name, *climber.effort, climbing_s, climber.requests)


def rehearse(problem: Problem) -> None:
    """Have everything compiled that a search runs, on some of its requests, before time counts: where the compiler's
    results are not on disk yet it takes longer than most searches.
    """
    few = problem.arrivals.part(0, min(_REHEARSED, len(problem.arrivals)))
    search(Problem(problem.fleet, few), count().__next__, _LOOKS)


def _unseen(problem: Problem, seed: int) -> list[Arrivals]:
    drift = measured_drift(problem.fleet, problem.arrivals)
    first = _UNSEEN_SEED + _UNSEEN * seed
    return [future(problem.fleet, problem.arrivals.span_s, first + number, drift) for number in range(_UNSEEN)]


def _attainments(problem: Problem, placement: Placement, traces: Sequence[Arrivals]) -> Floats:
    return np.array([replay(problem.tables, placement, one).attainment(one) for one in traces])


def _gained(before: Floats, after: Floats) -> bool:
    """Whether the second is better on average, by more than the standard error of the mean."""
    gains = after - before
    return len(gains) > 1 and bool(gains.mean() > gains.std(ddof=1) / len(gains) ** 0.5)


def _starts(problem: Problem, clock: Clock, deadline_s: float) -> Iterator[tuple[str, Placement]]:
    found = mp_search_sep(problem)
    yield "mp-search-sep", found.placement
    left_s = deadline_s - clock()
    if left_s > 0:
        beam = promising_beam(problem, found, most_requests=left_s * _REQUESTS_PER_S)
        if beam is not None:
            yield "alg1-beam1", beam.placement
    if clock() < deadline_s and problem.tables.shapes[0].devices == 1:
        yield "sr-greedy", sr_greedy(problem)


def _attainment(problem: Problem, placement: Placement) -> float:
    return replay(problem.tables, placement, problem.arrivals).attainment(problem.arrivals)


class _Climber:
    """Climbs from the start, again and again, and remembers the best."""

    def __init__(self, problem: Problem, start: Placement, budget_s: float, seed: int) -> None:
        self._problem, self._start, self._seed = problem, start, seed
        self._trace, self._goal = _judges(problem, budget_s, seed)
        self._rounds, self._climbs, self._last_success = 0, 0, 0
        self._counts = np.zeros(3, dtype=np.int64)
        self._begin()
        self._goal.floor[0] = self._record.guarded[0]
        self._best = self._record.value[0], start

    @property
    def best_placement(self) -> Placement:
        """The placement of highest value so far."""
        self._remember()
        return self._best[1]

    @property
    def effort(self) -> tuple[int, int, int, int]:
        """Proposals, accepted ones, simulated requests, climbs."""
        proposals, accepted, simulated = (self._counts + self._record.counts).tolist()
        return proposals, accepted, simulated, self._climbs

    @property
    def requests(self) -> int:
        """Requests of all traces together."""
        return len(self._trace.times_s)

    def advance(self) -> None:
        """A round of proposals; a new climb if there was no success for long."""
        if self._record.counts[0] - self._last_success > _PATIENCE:
            self._remember()
            self._counts += self._record.counts
            self._begin()
        value = self._record.value[0]
        self._rounds += 1
        climb(
            self._problem.costs, self._trace, self._board, self._layout, self._goal, self._record,
            self._problem.fleet.budget_bytes, self._problem.fleet.devices, _ROUND,
            self._seed * 1_000_003 + self._rounds, _STRUCTURAL, 0.0, _SLACK,
        )  # fmt: skip
        if self._record.value[0] > value:
            self._last_success = int(self._record.counts[0])

    def _begin(self) -> None:
        self._board, self._layout = _roomy_board(self._problem, self._trace, self._start)
        segments, models = len(self._goal.weight), len(self._problem.fleet.models)
        self._record = Record(
            good=np.zeros((segments, models), dtype=np.int64),
            value=np.zeros(1),
            guarded=np.zeros(1, dtype=np.int64),
            counts=np.zeros(3, dtype=np.int64),
            changed=np.zeros(models, dtype=np.uint8),
        )
        measure(self._problem.costs, self._trace, self._board, self._goal, self._record)
        self._record.counts[:] = 0
        self._last_success = 0
        self._climbs += 1

    def _remember(self) -> None:
        if self._record.value[0] > self._best[0]:
            self._best = self._record.value[0], _used_groups(self._problem, self._board, self._layout)


def _judges(problem: Problem, budget_s: float, seed: int) -> tuple[Trace, Goal]:
    """The given trace and the futures as one, and what counts in it."""
    arrivals, fleet = problem.arrivals, problem.fleet
    drift = measured_drift(fleet, arrivals)
    affordable = int(budget_s * _CLIMBED_PER_S / max(_REPLAYS_PER_FUTURE * len(arrivals), 1))
    lengths = min(max(affordable, 2), _MOST_FUTURES)
    count = lengths * max(1, round(arrivals.span_s / _FUTURE_S))
    length_s = lengths * arrivals.span_s / count
    of_train = _TRAIN_SHARE / (1 - _TRAIN_SHARE) * lengths
    futures = [future(fleet, length_s, count * seed + number, drift) for number in range(count)]
    every, begins = one_after_the_other([arrivals, *futures], _PAUSE_S)
    begin, end = arrivals.trimmed(TRIM_S)
    cuts = [0, begin, (begin + end) // 2, end, *begins[1:], len(every)]
    weight = [0.0, of_train, of_train, 0.0, *[1.0] * count]
    goal = Goal(
        cuts=np.array(cuts),
        weight=np.array(weight),
        guarded=np.array([0, 1, 1, 0, *[0] * count], dtype=np.uint8),
        floor=np.zeros(1, dtype=np.int64),
    )
    return trace_of(every, len(fleet.models)), goal


def _roomy_board(problem: Problem, trace: Trace, placement: Placement) -> tuple[Board, Layout]:
    """The placement on a board with as many groups as there are devices, most of them unused."""
    fleet, tables = problem.fleet, problem.tables
    shapes, members = tables.membership(placement.groups)
    spare = max(fleet.devices - len(shapes), 0)
    numbers = np.concatenate([shapes, np.full(spare, -1)])
    held = np.concatenate([members, np.zeros((spare, members.shape[1]), dtype=np.uint8)])
    board = board_of(problem.costs, trace, numbers, held)
    usable = [
        shape.devices if fleet.whole_nodes(shape) and shape.devices <= fleet.devices else 0 for shape in tables.shapes
    ]
    return board, layout_of(board, problem.costs, np.array(usable), fleet.budget_bytes)


def _used_groups(problem: Problem, board: Board, layout: Layout) -> Placement:
    placement = placement_of(problem.tables, board)
    used = [group for group, use in zip(placement.groups, layout.used, strict=True) if use and group.models]
    return Placement(tuple(used))
