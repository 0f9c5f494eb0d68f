"""Traces that might come instead of the one that came, so that a placement is not fitted to an accident."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.placement import Arrivals, SharedFleet
from planning.simulation.tables import Floats

WINDOW_S = 60.0
_LEAST_DRIFT = 0.1  # below that, what is measured is the chance of bursty arrivals


@dataclass(frozen=True, slots=True)
class Drift:
    """How rates wander from window to window: their squared coefficient of variation, and what the next one keeps."""

    variance: float
    memory: float

    @property
    def wanders(self) -> bool:
        """Whether there is more than the chance of a renewal process."""
        return self.variance > _LEAST_DRIFT


def measured_drift(fleet: SharedFleet, arrivals: Arrivals) -> Drift:
    """The drift in a trace: what its counts per window vary beyond rate × window × cv², relative to their squares."""
    windows = int(arrivals.span_s // WINDOW_S)
    if windows < 3:
        return Drift(0.0, 0.0)
    edges = arrivals.times_s[0] + WINDOW_S * np.arange(windows + 1)
    expected = np.array([model.rate_rps for model in fleet.models]) * WINDOW_S
    spread = expected * np.array([model.cv for model in fleet.models]) ** 2
    counts = np.array(
        [np.histogram(arrivals.times_s[arrivals.models == m], bins=edges)[0] for m in range(len(fleet.models))]
    )
    off = counts - expected[:, None]
    scale = float((expected**2).sum())
    variance = float(((off**2).mean(axis=1) - spread).sum()) / scale
    lag = float((off[:, 1:] * off[:, :-1]).mean(axis=1).sum()) / scale
    return Drift(max(variance, 0.0), min(max(lag / variance, 0.0), 0.95) if variance > 0 else 0.0)


def future(fleet: SharedFleet, duration_s: float, seed: int, drift: Drift) -> Arrivals:
    """Arrivals of every model as a renewal process of its rate with Gamma gaps of its coefficient of variation.

    Shape 1 / cv², scale cv² / rate. Where rates wander they do so from window to window, log-normally; and since then
    the popular models of tomorrow are others, every odd seed deals the rates out anew. Equal seeds give equal arrivals.
    """
    generator = np.random.default_rng(seed)
    rates = np.array([model.rate_rps for model in fleet.models])
    if drift.wanders and seed % 2:
        rates = generator.permutation(rates)
    times, models = [], []
    for index, model in enumerate(fleet.models):
        levels = _levels(generator, duration_s, drift)
        arrivals = _renewals(generator, rates[index], max(model.cv, 1e-3), levels, duration_s)
        times.append(arrivals)
        models.append(np.full(len(arrivals), index, dtype=np.int32))
    every = np.concatenate(times)
    order = np.argsort(every, kind="stable")
    return Arrivals.of(every[order], np.concatenate(models)[order])


def one_after_the_other(traces: list[Arrivals], pause_s: float) -> tuple[Arrivals, list[int]]:
    """The traces as one, with a pause between them that idles every group; and the number of each one's first request.

    The first trace keeps its times.
    """
    times: list[Floats] = []
    begins: list[int] = []
    offset_s = 0.0
    for trace in traces:
        begins.append(sum(len(one) for one in times))
        times.append(trace.times_s + offset_s)
        offset_s = float(times[-1][-1]) + pause_s if len(trace) else offset_s
    return Arrivals.of(np.concatenate(times), np.concatenate([trace.models for trace in traces])), begins


def _levels(generator: np.random.Generator, duration_s: float, drift: Drift) -> Floats:
    """Rate of every window, as a multiple of the mean."""
    windows = int(duration_s // WINDOW_S) + 1
    if not drift.wanders:
        return np.ones(windows)
    sigma = np.sqrt(np.log1p(drift.variance))
    state = generator.normal()
    levels = np.empty(windows)
    for window in range(windows):
        levels[window] = np.exp(sigma * state - sigma**2 / 2)
        state = drift.memory * state + np.sqrt(1 - drift.memory**2) * generator.normal()
    return levels


def _renewals(
    generator: np.random.Generator, rate_rps: float, cv: float, levels: Floats, duration_s: float
) -> Floats:  # fmt: skip
    """Renewals at rate 1 in operational time, which runs at the rate of each window."""
    if rate_rps <= 0:
        return np.zeros(0)
    edges_s = np.minimum(WINDOW_S * np.arange(len(levels) + 1), duration_s)
    passed = np.concatenate([[0.0], np.cumsum(np.diff(edges_s) * levels * rate_rps)])
    arrivals = np.zeros(0)
    while not len(arrivals) or arrivals[-1] < passed[-1]:
        gaps = generator.gamma(1 / cv**2, cv**2, max(16, int(1.2 * passed[-1])))
        arrivals = np.concatenate([arrivals, (arrivals[-1] if len(arrivals) else 0.0) + np.cumsum(gaps)])
    arrived: Floats = np.interp(arrivals[arrivals < passed[-1]], passed, edges_s)
    return arrived
