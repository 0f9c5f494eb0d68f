"""How many instances are up over time: a Markov process with zones, regimes, and losses and additions in groups.

Zones share regimes (calm, stormy; plenty, scarce) that nobody sees and that come and go by themselves. In a regime
the instances of a zone are lost, and missing ones come, by shocks of that zone. So losses are correlated in three ways:
within a zone by shocks, over time and between zones by regimes. `planning.availability_fit` fits it to traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

import numpy as np
import numpy.typing as npt

from data.availability import AvailabilityTrace, Change, in_zone
from data.errors import InvalidInput
from planning.shocks import Shocks

Matrix = npt.NDArray[np.float64]

_NOTICE_S = 30.0
_SELDOM = 1e-30  # a share of time that is never
_RARE = 1e-7  # of all changes from a count; rarer ones are left out of `rates`, which is sparse then


@dataclass(frozen=True, slots=True)
class Zone:
    """At most `most` instances; `losses` of those that are up and `gains` of those that are missing, by regime."""

    name: str
    most: int
    losses: tuple[Shocks, ...]
    gains: tuple[Shocks, ...]

    def rates(self, regime: int) -> Matrix:
        """Events per second from `n` to `m` instances of this zone, [n, m]."""
        rates: Matrix = self.losses[regime].down(self.most) + self.gains[regime].down(self.most)[::-1, ::-1]
        return rates


@dataclass(frozen=True, slots=True)
class Process:
    """`switching` [r][s] is how often per second regime r turns into s.

    Raises `InvalidInput` without a zone, or if a zone has other regimes.
    """

    zones: tuple[Zone, ...]
    switching: tuple[tuple[float, ...], ...] = ((0.0,),)

    def __post_init__(self) -> None:
        regimes = len(self.switching)
        of_zones = {len(part) for zone in self.zones for part in (zone.losses, zone.gains)}
        if not self.zones or of_zones != {regimes} or any(len(row) != regimes for row in self.switching):
            raise InvalidInput("a process needs a zone, and losses and gains of each zone in every regime")

    @property
    def most(self) -> int:
        """Instances of all zones together, at most."""
        return sum(zone.most for zone in self.zones)

    @property
    def weights(self) -> Matrix:
        """Share of time that each regime lasts."""
        return _stationary(generator(np.array(self.switching)))

    @property
    def loss_s(self) -> float:
        """How often per second an instance is lost, on average over regimes and zones."""
        return self._average([[shocks.each_s for shocks in zone.losses] for zone in self.zones])

    @property
    def gain_s(self) -> float:
        """How often per second a missing instance comes, on average over regimes and zones."""
        return self._average([[shocks.each_s for shocks in zone.gains] for zone in self.zones])

    def _average(self, each_s: Sequence[Sequence[float]]) -> float:
        sizes = np.array([zone.most for zone in self.zones])
        return float(sizes @ np.array(each_s) @ self.weights / sizes.sum())

    def alone(self, zone: int) -> Process:
        """The process of one zone."""
        return replace(self, zones=(self.zones[zone],))

    def sized(self, most: int) -> Process:
        """The same for `most` instances in all, spread over the zones as before; each comes and goes as it did."""
        shares = np.array([zone.most for zone in self.zones]) * most / max(self.most, 1)
        sizes = np.floor(shares).astype(int)
        sizes[np.argsort(sizes - shares, kind="stable")[: most - int(sizes.sum())]] += 1
        zones = (replace(zone, most=int(size)) for zone, size in zip(self.zones, sizes, strict=True))
        return replace(self, zones=tuple(zones))

    def rates(self) -> Matrix:
        """Events per second from `n` to `m` instances in all, [n, m], for who sees nothing but how many are up.

        Averages over what is not seen, the regime and who is where, in the long run. Exact for one zone; with
        several, those are taken to be independent in a regime, however it came about.
        """
        states = [self._long_run(zone) for zone in self.zones]
        table, often = np.zeros((self.most + 1, self.most + 1)), np.zeros(self.most + 1)
        for regime, weight in enumerate(self.weights):
            counts = [state[:, regime] / state[:, regime].sum() for state in states]
            often += weight * _sum_of(counts)
            for index, zone in enumerate(self.zones):
                others = _sum_of([one for other, one in enumerate(counts) if other != index])
                own = counts[index][:, None] * zone.rates(regime)
                for rest, chance in enumerate(others):
                    table[rest : rest + zone.most + 1, rest : rest + zone.most + 1] += weight * chance * own
        table /= often[:, None]
        table[table < _RARE * table.sum(axis=1, keepdims=True)] = 0.0
        return table

    def _long_run(self, zone: Zone) -> Matrix:
        """Share of time with n instances in this zone in each regime, [n, regime]."""
        counts, regimes = zone.most + 1, len(self.switching)
        joint = np.zeros((counts, regimes, counts, regimes))
        for regime in range(regimes):
            joint[:, regime, :, regime] = zone.rates(regime)
        for count in range(counts):
            joint[count, :, count, :] += np.array(self.switching)
        size = counts * regimes
        return _stationary(generator(joint.reshape(size, size))).reshape(counts, regimes)


def steady(
    most: int, lost_s: float, come_s: float, along: float = 0.0, spread: float = 20.0, zones: int = 1
) -> Process:
    """One regime: each instance is lost `lost_s` and each missing one comes `come_s` times per second.

    Of the same zone, each other one goes along with a loss with the chance `along`.
    """
    losses, gains = (Shocks(lost_s, along, spread),), (Shocks(come_s),)
    names = [""] if zones == 1 else [f"zone-{index}" for index in range(zones)]
    each = Process(tuple(Zone(name, 1, losses, gains) for name in names))
    return each.sized(most)


# SpotServe's recording of 10.6 h on g4dn.12xlarge, fitted (`process` in benchmarks/results/cpu-2-cores/spot.json).
RECORDED = Process(
    (
        Zone(
            "",
            24,
            (Shocks(0.1864 / 3600, 0.0813, 31.9), Shocks(0.8806 / 3600, 0.0813, 31.9)),
            (Shocks(0.0002 / 3600, 0.0339, 5.71), Shocks(0.8842 / 3600, 0.0339, 5.71)),
        ),
    ),
    ((0.0, 5.879 / 3600), (3.431 / 3600, 0.0)),
)


def generator(rates: Matrix) -> Matrix:
    """The rates with what leaves on the diagonal."""
    found: Matrix = rates - np.diag(rates.sum(axis=1))
    return found


def _stationary(matrix: Matrix) -> Matrix:
    """The long-run distribution of a generator matrix."""
    system = matrix.T.copy()
    system[-1] = 1.0
    found = np.maximum(np.linalg.solve(system, np.eye(len(matrix))[-1]), _SELDOM)
    shares: Matrix = found / found.sum()
    return shares


def _sum_of(distributions: Sequence[Matrix]) -> Matrix:
    """Of independent counts."""
    total = np.ones(1)
    for one in distributions:
        total = np.convolve(total, one)
    return total


@dataclass(slots=True)
class _Walk:
    """Who is up in each zone, and the regime."""

    process: Process
    random: np.random.Generator
    regime: int
    up: list[list[str]]
    born: int = 0
    tables: list[list[Matrix]] = field(default_factory=list)

    def __post_init__(self) -> None:
        regimes = range(len(self.process.switching))
        self.tables = [[zone.rates(regime) for zone in self.process.zones] for regime in regimes]

    def step(self) -> tuple[float, Change | None]:
        """Seconds until something happens, and the change, if it is one that is seen."""
        rows = [table[len(up)] for table, up in zip(self.tables[self.regime], self.up, strict=True)]
        switching = np.array(self.process.switching[self.regime])
        rates = np.concatenate([switching, *rows])
        if not rates.any():
            return inf, None
        pause_s = float(self.random.exponential(1 / rates.sum()))
        event = int(self.random.choice(len(rates), p=rates / rates.sum()))
        if event < len(switching):
            self.regime = event
            return pause_s, None
        event -= len(switching)
        for zone, row in enumerate(rows):
            if event < len(row):
                return pause_s, self.change(zone, event)
            event -= len(row)
        raise AssertionError("an event is one of those whose rates were summed")

    def change(self, zone: int, count: int) -> Change:
        """Let so many be up in a zone."""
        up = self.up[zone]
        if count < len(up):
            gone = [up[index] for index in sorted(self.random.permutation(len(up))[count:])]
            self.up[zone] = [name for name in up if name not in gone]
            return Change(0.0, "remove", tuple(gone))
        new = [in_zone(self.process.zones[zone].name, f"node-{self.born + index}") for index in range(count - len(up))]
        self.born += len(new)
        up.extend(new)
        return Change(0.0, "add", tuple(new))


def generate(process: Process, seed: int, duration_s: float, first: int) -> AvailabilityTrace:
    """A trace that starts with `first` instances, spread over the zones as their sizes are; who goes is drawn.

    Raises `InvalidInput` if `first` is not within 0 … `most`.
    """
    if not 0 <= first <= process.most:
        raise InvalidInput(f"a fleet of at most {process.most} instances cannot start with {first}")
    random = np.random.default_rng(seed)
    regime = int(random.choice(len(process.weights), p=process.weights))
    walk = _Walk(process, random, regime, [[] for _ in process.zones])
    started = [walk.change(index, zone.most) for index, zone in enumerate(process.sized(first).zones)]
    changes = [Change(0.0, "add", tuple(name for change in started for name in change.instances))] if first else []
    time_s = 0.0
    while True:
        pause_s, change = walk.step()
        time_s += pause_s
        if time_s >= duration_s:
            return AvailabilityTrace(f"generated {seed}", tuple(changes), duration_s)
        if change is not None:
            changes.append(replace(change, time_s=time_s, notice_s=min(_NOTICE_S, time_s)))
