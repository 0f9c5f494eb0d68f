"""Workloads drawn from a seed: equal seeds give equal values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

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
