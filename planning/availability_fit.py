"""Availability processes from traces: maximum likelihood, and tests of whether what was recorded is like the process.

Counts are seen at ticks, those that all times of a trace are multiples of; what goes and comes again within a tick
is not seen. The likelihood is that of such a panel (J. D. Kalbfleisch and J. F. Lawless, JASA 80(392), 1985), the
regimes being hidden (forward algorithm), and held to switch where ticks meet.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, inf, log

import numpy as np
import numpy.typing as npt
from scipy.linalg import expm
from scipy.optimize import minimize
from scipy.special import expit, logit

from data.availability import AvailabilityTrace
from data.errors import InvalidInput
from planning.availability import Matrix, Process, Zone, generator
from planning.shocks import Shocks

Ints = npt.NDArray[np.int64]

MOST_REGIMES = 2
_APART = 7.0  # how far, in logarithms, a parameter may go from where its search begins
_SHAPE = (-1.5, 1.5)  # at first: a fifth goes along, in groups of middling spread
_HALF = 0.5  # of an event in an hour is added to what was seen: no hazard is zero
_LEAST = 1e-100  # nothing is impossible, however unlikely
_NEVER = 1e9
_BUSY = 0.5


@dataclass(frozen=True, slots=True)
class Residuals:
    """Of every change of one zone's trace: `waits` and `sizes` are uniform and independent if the process is right.

    They are the distribution function of the process, given all before, at how long it took until the change and
    at how many were then up, drawn at random within what a tick does not tell (M. Rosenblatt, 1952; for ticks
    R. Haslinger, G. Pipa and E. N. Brown, Neural Computation 22(10), 2010).
    """

    waits: Matrix
    sizes: Matrix


def fit(traces: Sequence[AvailabilityTrace], most: int | None = None, regimes: int | None = None) -> Process:
    """The process that makes traces of the same zones most likely, with as many regimes as Akaike's criterion chooses.

    `most` is what the zones hold together; each holds what was seen in it unless told. Raises `InvalidInput` where
    nothing comes or nothing goes.
    """
    names = sorted({name for trace in traces for name in trace.zones})
    panels = [_Panel.of(trace, names) for trace in traces]
    steps = np.concatenate([panel.after - panel.before for panel in panels])
    if not (steps > 0).any() or not (steps < 0).any():
        raise InvalidInput("the traces hold no additions or no losses to fit; give longer ones")
    sizes = np.concatenate([table for panel in panels for table in (panel.before, panel.after)]).max(axis=0)
    zones = tuple((name, int(size)) for name, size in zip(names, sizes, strict=True))
    found: list[tuple[Process, float]] = []
    for count in range(1, MOST_REGIMES + 1) if regimes is None else sorted({1, regimes}):
        found.append(_Family(zones, count).fit(panels, found[0][0] if found else None))
    process = found[-1][0] if regimes else min(found, key=lambda one: one[1])[0]
    return process.sized(most) if most else process


def log_likelihood(process: Process, trace: AvailabilityTrace) -> float:
    """Natural logarithm of how likely a trace is, from its start on."""
    return _log_likelihood(process, _Panel.of(trace, [zone.name for zone in process.zones]))


def residuals(process: Process, trace: AvailabilityTrace, seed: int = 0) -> Residuals:
    """What tells whether the process of one zone is right. Raises `InvalidInput` for several zones."""
    if len(process.zones) != 1:
        raise InvalidInput("residuals are those of one zone; ask for `Process.alone` of each")
    random, panel = np.random.default_rng(seed), _Panel.of(trace, [process.zones[0].name])
    steps, belief = _Steps.of(process, panel.tick_s), process.weights
    everything = np.arange(process.most + 1)[:, None]
    waits, sizes = [], []
    for before, after, still in zip(panel.before, panel.after, steps.staying(panel), strict=True):
        reached = belief @ still
        ends = (reached @ steps.blocks(np.broadcast_to(before, everything.shape), everything)).sum(axis=1)
        here, there = int(before[0]), int(after[0])
        belief = _normal(reached @ steps.blocks(before[None], after[None])[0])
        if here != there:  # not the end of the trace
            waits.append(1 - reached.sum() + random.random() * (reached.sum() - ends[here]))
            ends[here] = 0.0
            sizes.append((ends[:there].sum() + random.random() * ends[there]) / ends.sum())
    return Residuals(np.array(waits), np.array(sizes))


def _normal(weights: Matrix) -> Matrix:
    found: Matrix = weights / weights.sum()
    return found


@dataclass(frozen=True, slots=True)
class _Panel:
    """Counts [interval, zone] up to the last tick of an interval, and at it; `ticks` it has; `tick_s` seconds each.

    The last interval ends with the trace, the others with a change.
    """

    before: Ints
    after: Ints
    ticks: Ints
    tick_s: float

    @classmethod
    def of(cls, trace: AvailabilityTrace, zones: Sequence[str]) -> _Panel:
        times_ms = [round(time_s * 1000) for time_s, _ in trace.counts] + [round(trace.duration_s * 1000)]
        counts = np.array([_counts_at(trace, name, times_ms[:-1]) for name in zones], dtype=np.int64).T
        tick_ms = gcd(*times_ms) or 1
        if tick_ms * len(times_ms) > _BUSY * times_ms[-1]:
            tick_ms = 1  # something at nearly every tick: round numbers, not when somebody looked
        ticks = np.diff(np.array(times_ms)) // tick_ms
        after = np.concatenate([counts[1:], counts[-1:]])
        seen = ticks > 0
        return cls(counts[seen], after[seen], ticks[seen], tick_ms / 1000)


def _counts_at(trace: AvailabilityTrace, zone: str, times_ms: Sequence[int]) -> list[int]:
    """Instances of a zone that are up from each time on."""
    found = trace.zones.get(zone)
    if found is None:
        return [0] * len(times_ms)
    starts = [round(time_s * 1000) for time_s, _ in found.counts]
    return [found.counts[bisect_right(starts, time_ms) - 1][1] for time_ms in times_ms]


@dataclass(frozen=True, slots=True)
class _Steps:
    """What may happen in a tick: `within` of each zone, [regime, n, m], between two halves of `switching`."""

    within: tuple[Matrix, ...]
    switching: Matrix

    @classmethod
    def of(cls, process: Process, tick_s: float) -> _Steps:
        regimes = range(len(process.switching))
        within = (np.stack([generator(zone.rates(regime)) for regime in regimes]) for zone in process.zones)
        half = expm(generator(np.array(process.switching)) * tick_s / 2)
        return cls(tuple(np.maximum(expm(table * tick_s), _LEAST) for table in within), half)

    def blocks(self, before: Ints, after: Ints) -> Matrix:
        """From regime to regime [row, regime, regime] as the counts go from one row to another in a tick."""
        chances = np.ones((len(before), len(self.switching)))
        for zone, table in enumerate(self.within):
            chances *= table[:, before[:, zone], after[:, zone]].T
        found: Matrix = self.switching @ (chances[:, :, None] * self.switching)
        return found

    def staying(self, panel: _Panel) -> Matrix:
        """The blocks of all ticks of each interval but the last, in which nothing is seen to change."""
        square, left = self.blocks(panel.before, panel.before), panel.ticks - 1
        found = np.broadcast_to(np.eye(len(self.switching)), square.shape)
        while left.any():
            found = np.where((left % 2 == 1)[:, None, None], found @ square, found)
            square, left = square @ square, left // 2
        return found


def _log_likelihood(process: Process, panel: _Panel) -> float:
    steps, belief, total = _Steps.of(process, panel.tick_s), process.weights, 0.0
    for block in steps.staying(panel) @ steps.blocks(panel.before, panel.after):
        belief = belief @ block
        seen = belief.sum()
        if not seen > 0:
            return -inf
        belief, total = belief / seen, total + log(seen)
    return total


@dataclass(frozen=True, slots=True)
class _Family:
    """Processes of some zones (name, most) with so many regimes, as vectors of free parameters.

    How many go or come together is alike in all zones and regimes; how often differs.
    """

    zones: tuple[tuple[str, int], ...]
    regimes: int

    def fit(self, panels: Sequence[_Panel], near: Process | None) -> tuple[Process, float]:
        """The likeliest process, and Akaike's criterion of it."""

        def surprise(vector: Matrix) -> float:
            process = self.process(vector)
            return min(-sum(_log_likelihood(process, panel) for panel in panels), _NEVER)

        found = [
            minimize(surprise, start, method="L-BFGS-B", bounds=[(x - _APART, x + _APART) for x in start])
            for start in self.starts(panels, near)
        ]
        best = min(found, key=lambda one: float(one.fun))
        return self.process(best.x), 2 * (len(best.x) + float(best.fun))

    def process(self, vector: Matrix) -> Process:
        """Shapes of losses and gains (two each), hazards [zone, regime, kind], switching between different regimes."""
        shapes, hazards = vector[:4], np.exp(vector[4 : 4 + 2 * len(self.zones) * self.regimes])
        each = hazards.reshape(len(self.zones), self.regimes, 2)
        switching = np.zeros((self.regimes, self.regimes))
        switching[~np.eye(self.regimes, dtype=bool)] = np.exp(vector[4 + hazards.size :])
        alike = [Shocks(1.0, float(expit(along)), float(np.exp(spread))) for along, spread in shapes.reshape(2, 2)]
        zones = []
        for (name, most), rows in zip(self.zones, each, strict=True):
            losses, gains = (
                tuple(one.times(float(often)) for often in row) for one, row in zip(alike, rows.T, strict=True)
            )
            zones.append(Zone(name, most, losses, gains))
        return Process(tuple(zones), tuple(tuple(map(float, row)) for row in switching))

    def starts(self, panels: Sequence[_Panel], near: Process | None) -> list[Matrix]:
        """Regimes that differ in how much happens, and in whether instances rather go or come."""
        shape, each = _shape(near), np.log(_hazards(panels, np.array([most for _, most in self.zones])))
        offsets = np.linspace(-1.0, 1.0, self.regimes) if self.regimes > 1 else np.zeros(1)
        switching = np.full(self.regimes * (self.regimes - 1), log(1 / 3600))
        hazards = each[:, None, :] + offsets[None, :, None] * np.array([[[1.0, 1.0]], [[1.0, -1.0]]])[:, None]
        return [np.concatenate([shape, one.ravel(), switching]) for one in hazards[: self.regimes]]


def _shape(near: Process | None) -> Matrix:
    if near is None:
        return np.array([*_SHAPE, *_SHAPE])
    pair = near.zones[0].losses[0], near.zones[0].gains[0]
    return np.array([x for one in pair for x in (logit(one.along), log(one.spread))])


def _hazards(panels: Sequence[_Panel], most: Ints) -> Matrix:
    """Losses per second and instance that is up, and gains per second and missing one, of each zone [zone, kind]."""
    found = np.full((len(most), 2), _HALF)
    seconds = np.full((len(most), 2), 3600.0)
    for panel in panels:
        steps, lasts_s = panel.after - panel.before, (panel.ticks * panel.tick_s)[:, None]
        found += np.stack([np.maximum(-steps, 0).sum(axis=0), np.maximum(steps, 0).sum(axis=0)], axis=1)
        up_s = (panel.before * lasts_s).sum(axis=0)
        seconds += np.stack([up_s, most * lasts_s.sum() - up_s], axis=1)
    hazards: Matrix = found / seconds
    return hazards
