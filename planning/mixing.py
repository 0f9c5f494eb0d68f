"""How many spot and on-demand instances to hold, how many of them spare, and which layout to run on them.

A Markov decision process over (spot instances that the market has, spot and on-demand instances held, layout in
force). The market is `planning.availability.Process`; what is lost of it hits the instances held and the others
alike. At every change an *option* is chosen: so many of each kind, and a layout that needs them, or one or two fewer.
The average cost is minimised by Howard's policy iteration (M. L. Puterman, Markov Decision Processes, 1994, §11.2);
costs are dollars: for instances, for each second of a request's latency, and for each request beyond its limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.linalg import splu

from data.errors import InvalidInput
from planning.availability import Process
from planning.simulation.serving_perennial import Target
from planning.spot_policy import Book

Matrix = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MOST_INSTANCES = 48
MOST_SPARES = 2
_ROUNDS = 60


@dataclass(frozen=True, slots=True)
class Market:
    """Prices in dollars per instance-second, and how long an instance takes that is ordered at a notice.

    What is ordered is there `launch_s` later; a loss is known `grace_s` before it happens.
    """

    spot_usd_s: float
    on_demand_usd_s: float
    launch_s: float = 120.0
    grace_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Option:
    """Instances held, and the number of the layout that runs on them (0: none)."""

    spot: int
    on_demand: int
    layout: int


@dataclass(frozen=True, slots=True)
class _Events:
    """What can happen while an option is in force: `rate` from running state `row` to `count` and a held state."""

    row: Ints
    rate: Matrix
    count: Ints
    held: Ints


@dataclass(frozen=True, slots=True)
class Mixing:
    """A solved policy. `decide` is its lookup, `target` what to run on what is there; `average` dollars per second.

    `choice` [count, held state] is an option's number, `bias` [count, option] the dollars that being there costs
    beyond the average.
    """

    market: Market
    layouts: tuple[Target, ...]
    options: tuple[Option, ...]
    choice: Ints
    bias: Matrix
    moving: Matrix
    average: float
    size: tuple[int, int, int]

    def decide(self, count: int, spot: int, on_demand: int, layout: int) -> Option:
        """The option to go on with if the market has `count`, of which `spot` are held beside `on_demand`."""
        most, hired, _ = self.size
        count = min(count, most - 1)
        state = np.ravel_multi_index((min(spot, count), min(on_demand, hired - 1), layout), self.size)
        return self.options[int(self.choice[count, state])]

    def target(self, instances: int, now: Target | None) -> Target | None:
        """What to run on so many instances if `now` runs: spares stay spare where that is cheaper."""
        here = self.layouts.index(now) + 1 if now in self.layouts else 0
        totals = [option.spot + option.on_demand for option in self.options]
        total = max(count for count in set(totals) if count <= max(instances, 0))
        known = [number for number, count in enumerate(totals) if count == total]
        best = min(known, key=lambda number: self.moving[here, self.options[number].layout] + self.bias[-1, number])
        layout = self.options[best].layout
        return self.layouts[layout - 1] if layout else None


def solve_mixing(
    book: Book, process: Process, market: Market, latency_usd: float, most_on_demand: int = 8, miss_usd: float = 0.0
) -> Mixing:
    """The policy of least average cost if a second of a request's latency costs `latency_usd`, a late one `miss_usd`.

    Raises `InvalidInput` beyond `MOST_INSTANCES`, and for late requests if the book was made without a limit.
    """
    if process.most > MOST_INSTANCES:
        raise InvalidInput(f"mixing is decided for at most {MOST_INSTANCES} instances, not {process.most}")
    if miss_usd and not book.late_rps:
        raise InvalidInput("a late request has a price but no request is late without a limit; give one in seconds")
    serving = book.problem.serving * latency_usd
    if miss_usd:
        serving = serving + np.array(book.late_rps) * miss_usd
    problem = _Problem.of(book, process, market, (serving, book.problem.moving * latency_usd), most_on_demand)
    choice = problem.best(np.zeros((process.most + 1, len(problem.options))))
    average, bias = problem.evaluate(choice)
    for _ in range(_ROUNDS):
        found = problem.best(bias, choice)
        if (found == choice).all():
            break
        choice = found
        average, bias = problem.evaluate(choice)
    return Mixing(market, problem.layouts, problem.options, choice, bias, problem.moving, average, problem.size)


@dataclass(frozen=True, slots=True)
class _Problem:
    """`size` is (spot held, on demand, layout) of the held states; `running` dollars per second of an option;
    `going` [held state, option] dollars of a decision.
    """

    process: Process
    layouts: tuple[Target, ...]
    options: tuple[Option, ...]
    size: tuple[int, int, int]
    moving: Matrix
    running: Matrix
    going: Matrix
    events: _Events

    @classmethod
    def of(
        cls, book: Book, process: Process, market: Market, dollars: tuple[Matrix, Matrix], most_on_demand: int
    ) -> _Problem:
        """`dollars` are what serving costs per second with each option of the book, and what transitions cost."""
        needed = book.problem.fits.argmax(axis=0)
        numbers = _useful(needed, dollars[0])
        layouts = tuple(book.layouts.targets[number - 1] for number in numbers[1:])
        needed, serving, moving = needed[numbers], dollars[0][numbers], dollars[1][np.ix_(numbers, numbers)]
        hired = min(most_on_demand, process.most)
        options = _options(needed, process.most, hired)
        size = process.most + 1, hired + 1, len(needed)
        spot = np.array([one.spot for one in options])
        on_demand = np.array([one.on_demand for one in options])
        layout = np.array([one.layout for one in options])
        running = serving[layout] + spot * market.spot_usd_s + on_demand * market.on_demand_usd_s
        going = _going(size, (spot, on_demand, layout), needed, serving, moving, market)
        return cls(process, layouts, options, size, moving, running, going, _events(process, options, size))

    def best(self, bias: Matrix, now: Ints | None = None) -> Ints:
        """The cheapest decision of every (count, held state); `now` is kept where nothing is cheaper."""
        spot = np.array([option.spot for option in self.options])
        found = np.zeros((self.process.most + 1, len(self.going)), dtype=np.int64)
        for count in range(self.process.most + 1):
            value = self.going + np.where(spot <= count, bias[count], np.inf)[None, :]
            found[count] = value.argmin(axis=1)
            if now is not None:
                rows = np.arange(len(value))
                kept = value[rows, now[count]]
                stays = kept <= value[rows, found[count]] + 1e-12 * (1 + np.abs(kept))
                found[count] = np.where(stays, now[count], found[count])
        return found

    def evaluate(self, choice: Ints) -> tuple[float, Matrix]:
        """Average cost and bias [count, option]: one linear equation for each running state."""
        counts, options, it = self.process.most + 1, len(self.options), self.events
        size = counts * options
        chosen = choice[it.count, it.held]
        columns = it.count * options + chosen
        cost = np.tile(self.running, counts)
        np.add.at(cost, it.row, it.rate * self.going[it.held, chosen])
        leaving = np.bincount(it.row, it.rate, size)
        alone = leaving == 0  # more spot instances held than the market has: never so
        leaving[alone], cost[alone] = 1.0, 0.0
        every = np.arange(size)
        rows = np.concatenate([every, it.row, every[~alone], [size]])
        cols = np.concatenate([every, columns, np.full(int((~alone).sum()), size), [(counts - 1) * options]])
        values = np.concatenate([leaving, -it.rate, np.ones(int((~alone).sum())), [1.0]])
        system = coo_matrix((values, (rows, cols)), shape=(size + 1, size + 1)).tocsc()
        solution = splu(system).solve(np.append(cost, 0.0))
        return float(solution[size]), solution[:size].reshape(counts, options)


def _useful(needed: Ints, serving: Matrix) -> list[int]:
    """Nothing, and layouts that no other one with as few instances beats; by instances."""
    kept, best = [0], np.inf
    for number in sorted(range(1, len(needed)), key=lambda one: (needed[one], serving[one])):
        if serving[number] < best:
            best = serving[number]
            kept.append(number)
    return kept


def _options(needed: Ints, most: int, hired: int) -> tuple[Option, ...]:
    found = [Option(0, 0, 0)]
    for layout in range(1, len(needed)):
        for total in range(int(needed[layout]), int(needed[layout]) + MOST_SPARES + 1):
            found += [Option(total - k, k, layout) for k in range(min(total, hired) + 1) if total - k <= most]
    return tuple(found)


def _going(
    size: tuple[int, int, int],
    options: tuple[Ints, Ints, Ints],
    needed: Ints,
    serving: Matrix,
    moving: Matrix,
    market: Market,
) -> Matrix:
    """Dollars of every decision [held state, option]: one move, or two with the best layout there is between."""
    spot, on_demand, layout = options
    held_spot, held_hired, here = (axis.ravel()[:, None] for axis in np.indices(size))
    there = np.minimum(held_spot, spot) + np.minimum(held_hired, on_demand)
    able = np.array([np.where(needed <= count, serving, np.inf).argmin() for count in range(int(there.max()) + 1)])
    between = able[there]
    waiting_s = market.launch_s - market.grace_s
    late = (
        moving[here, between] + moving[between, layout] + waiting_s * np.maximum(serving[between] - serving[layout], 0)
    )
    dollars: Matrix = np.where(needed[layout] <= there, moving[here, layout], late)
    return dollars


def _events(process: Process, options: tuple[Option, ...], size: tuple[int, int, int]) -> _Events:
    """Losses take of the instances held as many as chance will have it; what is new can be had at once."""
    found: list[tuple[int, float, int, int]] = []
    rates = process.rates()
    for count in range(process.most + 1):
        for number, one in enumerate(options):
            if one.spot > count:
                continue
            row = count * len(options) + number
            for rate, later, still in _changes(rates[count], count, one.spot):
                state = int(np.ravel_multi_index((still, one.on_demand, one.layout), size))
                found.append((row, rate, later, state))
    rows, rates, counts, states = (np.array(column) for column in zip(*found, strict=True))
    return _Events(rows, rates, counts, states)


def _changes(row: Matrix, count: int, spot: int) -> list[tuple[float, int, int]]:
    """(per second, count after, spot instances still held or new) of what can happen to the market."""
    found = []
    for after in (int(index) for index in np.flatnonzero(row)):
        lost = max(count - after, 0)
        for hit in range(max(lost - (count - spot), 0), min(lost, spot) + 1):
            chance = comb(spot, hit) * comb(count - spot, lost - hit) / comb(count, lost)
            found.append((float(row[after]) * chance, after, spot - hit + max(after - count, 0)))
    return found
