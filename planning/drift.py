"""Whether arrivals are still those that a plan book was made for.

Every figure of a demand is tested for being *materially* off: the null hypothesis is that it lies within `TOLERANCE`
of what was assumed (more where that was itself measured on few requests), so that a long history does not turn a
difference that changes nothing into an alarm, nor a short one its noise. The levels of all tests add up to `level`
(Bonferroni): with arrivals as assumed, that is the most that the chance of any alarm can be.

* Rate: the count of a window, under a stationary Gamma renewal process. Its overdispersion comes with the CV, the
  larger one of what was assumed and what is seen: bursts alone are no change of the rate.
* CV: the logarithm of the sample's, against Gamma samples of as many gaps.
* Lengths: Student's t for the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np
from scipy.special import gammainc, ndtr, stdtr

from data.demand import Demand, History, gap_cv
from planning.simulation.tables import Floats

TOLERANCE = 0.2
"""Relative; the search of placements is not sensitive to less."""
LEVEL = 0.01
"""Chance of an alarm without a drift, at most."""

_FIGURES = 4  # tested of every model
_SIGMAS = 3.0  # by which an assumption that was measured may be off
_LEAST_GAPS, _LEAST_LENGTHS = 20, 20
_DRAWS, _MOST_DRAWN = 400, 2000
_LEAST_P = 1e-12  # that is still worth telling
_LEAST_CV = 0.05  # of a renewal process that is taken for random


@dataclass(frozen=True, slots=True)
class Drift:
    """A figure of a model that is not what was assumed; `p` is how likely it would be seen if it were."""

    model: str
    figure: str
    assumed: float
    recent: float
    p: float

    def __str__(self) -> str:
        chance = f"{self.p:.1g}" if self.p >= _LEAST_P else f"below {_LEAST_P:g}"
        return f"{self.figure} of {self.model}: {self.assumed:.3g} assumed, {self.recent:.3g} seen (p {chance})"


def drifts(assumed: Sequence[Demand], recent: History, *, level: float = LEVEL) -> tuple[Drift, ...]:
    """What has drifted, in the order of the demands. Equal arguments give equal results.

    The window is that of all arrivals in `recent`; a model of `assumed` that is not among its names was not asked for.
    """
    each = level / max(_FIGURES * len(assumed), 1)
    return tuple(one for demand in assumed for one in _compared(demand, recent) if one.p < each)


def _compared(demand: Demand, recent: History) -> Iterator[Drift]:
    number = recent.names.index(demand.model) if demand.model in recent.names else -1
    times_s, lengths = recent.times_s(number), recent.lengths(number)
    count, seen_cv = len(times_s), gap_cv(times_s)
    if recent.window_s > 0:
        rate_rps = count / recent.window_s
        p = rate_p(demand, count, recent.window_s, max(demand.cv, seen_cv if count > _LEAST_GAPS else 0.0))
        yield Drift(demand.model, "requests/s", demand.rate_rps, rate_rps, p)
    if count > _LEAST_GAPS:
        yield Drift(demand.model, "CV of arrivals", demand.cv, seen_cv, cv_p(demand, seen_cv, count - 1))
    for name, told, tokens in zip(
        ("input tokens", "output tokens"), (demand.input_tokens, demand.output_tokens), lengths, strict=True
    ):
        if count >= _LEAST_LENGTHS:
            p = length_p(told, demand.requests, tokens.astype(float))
            yield Drift(demand.model, name, told, float(tokens.mean()), p)


def rate_p(demand: Demand, count: int, window_s: float, cv: float) -> float:
    """How likely a window of `window_s` has a count as far off as `count` or further, at the nearest rate tolerated.

    Two-sided; 1 within the tolerance. A model that was not to be asked for at all is tested at one request in a
    window.
    """
    margin = TOLERANCE + (_SIGMAS * cv / sqrt(demand.requests) if demand.requests else 0.0)
    low, high = demand.rate_rps / (1 + margin), demand.rate_rps * (1 + margin)
    if count > high * window_s:
        return min(1.0, 2 * at_least(count, max(high, 1 / window_s) * window_s, cv))
    if count < low * window_s:
        return min(1.0, 2 * (1 - at_least(count + 1, low * window_s, cv)))
    return 1.0


def at_least(count: int, expected: float, cv: float) -> float:
    """P(N ≥ count) of a stationary renewal process with Gamma gaps in a window in which `expected` arrive.

    The first arrival comes after a residual gap, so P(N ≥ n) = λ ∫₀ᵀ P(N° = n - 1) du with N° of the ordinary process
    (D. R. Cox, Renewal Theory, 1962, §3.1 and §4.1), and sums of gaps are Gamma again: with the unit of time 1/λ and
    gaps of shape k = 1/cv², ∫₀ᵀ F(mk; u) du = T F(mk; kT) - m F(mk + 1; kT).
    """
    if count <= 0:
        return 1.0
    shape = max(cv, _LEAST_CV) ** -2

    def integral(gaps: int) -> float:
        """∫ P(as many gaps are over by u) du up to the window's end."""
        if gaps == 0:
            return expected
        ended, longer = gammainc([gaps * shape, gaps * shape + 1], shape * expected)
        return float(expected * ended - gaps * longer)

    return min(1.0, max(0.0, integral(count - 1) - integral(count)))


def cv_p(demand: Demand, seen: float, gaps: int) -> float:
    """How likely so many Gamma gaps have a CV as far off as `seen` or further, at the nearest tolerated."""
    told, seen = max(demand.cv, _LEAST_CV), max(seen, _LEAST_CV)  # what comes by the clock is no drift from itself
    error = sqrt((1 + told**2) / (2 * demand.requests)) if demand.requests else 0.0
    margin = TOLERANCE + _SIGMAS * error
    nearest = min(max(seen, told / (1 + margin)), told * (1 + margin))
    if seen == nearest:
        return 1.0
    logs = _sampled_log_cvs(nearest, min(gaps, _MOST_DRAWN))
    return float(2 * ndtr(-abs(log(seen) - logs.mean()) / logs.std()))


def _sampled_log_cvs(cv: float, gaps: int) -> Floats:
    """Logarithms of the CVs of samples of Gamma gaps, always the same ones."""
    shape = cv**-2
    drawn = np.random.default_rng(gaps).gamma(shape, 1 / shape, (_DRAWS, gaps))
    values: Floats = np.log(drawn.std(axis=1) / drawn.mean(axis=1))
    return values


def length_p(told: float, requests: int, tokens: Floats) -> float:
    """How likely a mean as far from `told` or further is, at the nearest mean tolerated: Student's t, two-sided.

    The spread of the lengths is taken from `tokens`, also for what was told on so many `requests`.
    """
    mean, count = float(tokens.mean()), len(tokens)
    spread = float(tokens.std(ddof=1))
    nearest = min(max(mean, told / (1 + TOLERANCE)), told * (1 + TOLERANCE))
    if mean == nearest:
        return 1.0
    error = spread * sqrt(1 / count + (1 / requests if requests else 0.0))
    return float(2 * stdtr(count - 1, -abs(mean - nearest) / error)) if error > 0 else 0.0
