"""Workloads and availability traces drawn from a seed: equal seeds give equal values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

from data.availability import AvailabilityTrace, Change
from data.errors import InvalidInput
from data.workload import Request, Workload

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Fixed:
    """Every length is `tokens`."""

    tokens: int

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """`count` lengths."""
        return [self.tokens] * count


@dataclass(frozen=True, slots=True)
class Uniform:
    """Lengths between `least` and `most`, both included."""

    least: int
    most: int

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """`count` lengths."""
        return [int(length) for length in generator.integers(self.least, self.most, size=count, endpoint=True)]


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Lengths whose logarithm is normal with standard deviation `sigma`, cut to 1 … `most`."""

    median: float
    sigma: float
    most: int

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """`count` lengths."""
        lengths = generator.lognormal(np.log(self.median), self.sigma, size=count)
        return [int(length) for length in np.clip(np.rint(lengths), 1, self.most)]


Lengths = Fixed | Uniform | LogNormal


def synthetic_workload(
    seed: int,
    *,
    requests: int,
    rate_rps: float,
    cv: float,
    inputs: Lengths,
    outputs: Lengths,
    exact: bool = True,
    name: str = "synthetic",
) -> Workload:
    """A workload with Gamma arrivals (see `gamma_gaps`); the first request arrives at 0 s."""
    generator = np.random.default_rng(seed)
    gaps = gamma_gaps(generator, gaps=max(requests - 1, 0), rate_rps=rate_rps, cv=cv, exact=exact)
    arrivals = np.concatenate([[0.0], np.cumsum(gaps)])[:requests]
    rows = zip(arrivals, inputs.draw(generator, requests), outputs.draw(generator, requests), strict=True)
    return Workload(name, tuple(Request(float(arrival_s), *tokens) for arrival_s, *tokens in rows))


def gamma_gaps(generator: np.random.Generator, *, gaps: int, rate_rps: float, cv: float, exact: bool = True) -> Vector:
    """Gaps (seconds) between arrivals of a Gamma renewal process: shape 1/cv², scale cv²/rate.

    The CV of a finite sample misses the process's own by about √((1 + cv²)/2n), relative. `exact`
    raises the drawn gaps to the one power at which the sample's CV is `cv`, then scales them to the
    mean 1/rate: order, independence and positivity stay. It needs more than 1 + cv² gaps.
    """
    if not rate_rps > 0 or not cv >= 0:
        raise InvalidInput(f"arrivals need a positive rate and a CV of at least 0, not {rate_rps} and {cv}")
    if cv == 0 or gaps == 0:
        return np.full(gaps, 1 / rate_rps)
    shape = cv**-2
    # Gamma(a) = Gamma(a + 1)·U^(1/a); in logarithms, because bursty gaps are smaller than any float.
    drawn = np.log(generator.standard_gamma(shape + 1, gaps)) + np.log1p(-generator.random(gaps)) / shape
    if not exact:
        gaps_s: Vector = np.exp(drawn) * (cv**2 / rate_rps)
        return gaps_s
    fitted: Vector = np.exp(_power(drawn, cv) * (drawn - drawn.max()))
    return fitted / (float(fitted.mean()) * rate_rps)


def _power(logs: Vector, cv: float) -> float:
    """The power p > 0 at which exp(p·logs) has the coefficient of variation `cv`.

    It is unique: the derivative of log E[x²ᵖ]/E[xᵖ]² with respect to p is a difference of means of log x
    under weights x²ᵖ and xᵖ, which is never negative.
    """
    if len(logs) <= 1 + cv**2:
        raise InvalidInput(
            f"{len(logs)} gaps cannot have a CV of {cv:g}; draw more than {1 + cv**2:.0f} or exact=False"
        )
    centred = logs - logs.max()

    def excess(power: float) -> float:
        values = np.exp(power * centred)
        return float(values.std() / values.mean()) - cv

    high = 1.0
    while excess(high) <= 0:
        high *= 2
        if high > 1e9:
            raise InvalidInput(f"{len(logs)} gaps with ties cannot have a CV of {cv:g}; draw more")
    return float(brentq(excess, 0.0, high, xtol=1e-15, rtol=1e-14))


def synthetic_availability(
    seed: int,
    *,
    duration_s: float,
    instances: int,
    most: int,
    removals_per_h: float,
    mean_group: float = 1.4,
    return_after_s: float = 120.0,
    notice_s: float = 30.0,
    kill_share: float = 0.1,
    least: int = 0,
    name: str = "synthetic",
) -> AvailabilityTrace:
    """A fleet of `instances` that loses groups at Poisson times and gets them back.

    Groups are geometric with mean `mean_group`; a share `kill_share` of them goes without notice; what was
    lost returns, as new instances, an exponential time of mean `return_after_s` later. The fleet stays
    between `least` and `most`.
    """
    if not least <= instances <= most or mean_group < 1 or not 0 <= kill_share <= 1:
        raise InvalidInput("the fleet needs least ≤ instances ≤ most, groups of at least 1 and a share within 0 … 1")
    generator = np.random.default_rng(seed)
    alive = [f"i{index}" for index in range(instances)]
    changes = [Change(0.0, "add", tuple(alive))]
    born = instances
    for at_s, wanted in _events(generator, duration_s, removals_per_h, mean_group, return_after_s):
        if wanted < 0:
            gone = min(-wanted, len(alive) - least)
            taken = sorted(int(index) for index in generator.permutation(len(alive))[:gone])
            notice = 0.0 if generator.random() < kill_share else min(notice_s, at_s)
            change = Change(at_s, "remove", tuple(alive[index] for index in taken), notice)
            alive = [one for index, one in enumerate(alive) if index not in taken]
        else:
            new = [f"i{born + index}" for index in range(min(wanted, most - len(alive)))]
            born, alive, change = born + len(new), alive + new, Change(at_s, "add", tuple(new))
        if change.instances:
            changes.append(change)
    return AvailabilityTrace(name, tuple(changes), duration_s)


def _events(
    generator: np.random.Generator, duration_s: float, removals_per_h: float, mean_group: float, return_after_s: float
) -> list[tuple[float, int]]:
    """Times and signed sizes of the removals and of the returns that follow them, in order of time."""
    count = int(generator.poisson(removals_per_h * duration_s / 3600))
    times = generator.uniform(0, duration_s, count)
    sizes = generator.geometric(1 / mean_group, count)
    returns = times + generator.exponential(return_after_s, count)
    events = [(float(at), -int(size)) for at, size in zip(times, sizes, strict=True)]
    events += [(float(at), int(size)) for at, size in zip(returns, sizes, strict=True)]
    return sorted(event for event in events if event[0] < duration_s)
