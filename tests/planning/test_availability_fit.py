"""Fitted processes: what generated a trace is found again, and the test of the fit tells others apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import kstest

from data.availability import AvailabilityTrace, Change
from data.errors import InvalidInput
from planning.availability import Process, Zone, generate, steady
from planning.availability_fit import fit, log_likelihood, residuals
from planning.shocks import Shocks

ONE = steady(12, 1e-4, 8e-4, along=0.3, spread=8.0)
SCARCE, PLENTY = Shocks(5e-4, 0.2, 5.0), Shocks(2e-5, 0.2, 5.0)
MODULATED = Process(
    (Zone("", 8, (PLENTY, SCARCE), (Shocks(2e-3, 0.1, 5.0), Shocks(5e-5, 0.1, 5.0))),),
    ((0.0, 1 / 9000), (1 / 6000, 0.0)),
)


def _in_ticks(trace: AvailabilityTrace, tick_s: float) -> AvailabilityTrace:
    """As who looks every `tick_s` sees it: an instance that comes and goes in between is not seen."""
    ends = [round(tick_s * index, 3) for index in range(int(trace.duration_s // tick_s) + 1)]
    changes, before = [], frozenset[str]()
    for time_s in ends:
        now = trace.usable(time_s)
        changes += [Change(time_s, "remove", tuple(sorted(before - now)))] if before - now else []
        changes += [Change(time_s, "add", tuple(sorted(now - before)))] if now - before else []
        before = now
    return AvailabilityTrace(trace.name, tuple(changes), ends[-1])


@pytest.mark.slow
def test_one_regime_is_found_again_in_ticks_too() -> None:
    trace = generate(ONE, 1, 6e5, 8)
    for seen in (trace, _in_ticks(trace, 300.0)):
        found = fit([seen], most=12, regimes=1)
        assert found.loss_s == pytest.approx(1e-4, rel=0.15)
        assert found.gain_s == pytest.approx(8e-4, rel=0.15)
        assert found.zones[0].losses[0].along == pytest.approx(0.3, abs=0.1)


@pytest.mark.slow
def test_regimes_are_found_again_and_chosen_by_themselves() -> None:
    trace = generate(MODULATED, 2, 8e5, 8)
    found = fit([trace], most=8)
    assert len(found.switching) == 2
    assert sorted(found.weights) == pytest.approx([0.4, 0.6], abs=0.12)
    losses = sorted(shocks.each_s for shocks in found.zones[0].losses)
    assert losses[1] == pytest.approx(5e-4, rel=0.3)
    assert losses[0] < 6e-5
    assert log_likelihood(found, trace) >= log_likelihood(MODULATED, trace) - 0.1


def test_the_test_of_the_fit_rejects_another_process() -> None:
    trace = generate(MODULATED, 3, 6e5, 8)
    right, wrong = residuals(MODULATED, trace), residuals(fit([trace], regimes=1), trace)
    assert len(right.waits) == len(trace.counts) - 1
    assert kstest(right.waits, "uniform").pvalue > 0.01
    assert kstest(right.sizes, "uniform").pvalue > 0.01
    assert kstest(wrong.waits, "uniform").pvalue < 1e-4


@pytest.mark.slow
def test_zones_that_share_regimes_are_fitted_together() -> None:
    (zone,) = MODULATED.zones
    both = replace(MODULATED, zones=(replace(zone, name="a", most=4), replace(zone, name="b", most=4)))
    trace = generate(both, 4, 3e5, 8)
    found = fit([trace], regimes=2)
    assert [(one.name, one.most) for one in found.zones] == [("a", 4), ("b", 4)]
    apart = sum(log_likelihood(found.alone(index), one) for index, one in enumerate(trace.zones.values()))
    assert log_likelihood(found, trace) > apart + 10
    with pytest.raises(InvalidInput, match="one zone"):
        residuals(found, trace)


def test_several_traces_are_pooled() -> None:
    traces = [generate(ONE, seed, 5e4, 8) for seed in range(4)]
    pooled = fit(traces, most=12, regimes=1)
    assert sum(log_likelihood(pooled, one) for one in traces) > sum(
        log_likelihood(fit(traces[:1], most=12, regimes=1), one) for one in traces
    )


def test_round_numbers_are_no_ticks() -> None:
    """Something at every minute: that hides no more than what is told."""
    steps = [Change(0.0, "add", ("a", "b", "c", "d")), Change(60.0, "remove", ("a",)), Change(120.0, "add", ("e",))]
    steps += [Change(180.0, "remove", ("b", "c")), Change(240.0, "add", ("f", "g"))]
    found = fit([AvailabilityTrace("minutes", tuple(steps), 240.0)], regimes=1)
    assert found.loss_s == pytest.approx(3 / (13 * 60), rel=0.2)


def test_what_was_never_seen_is_not_impossible() -> None:
    steps = [Change(0.0, "add", ("a", "b")), Change(50.0, "remove", ("a",)), Change(90.0, "add", ("c",))]
    found = fit([AvailabilityTrace("short", tuple(steps), 100.0)])
    assert np.isfinite(found.rates()).all()
    assert (found.rates().sum(axis=1) > 0).all()


def test_a_trace_without_changes_cannot_be_fitted() -> None:
    trace = AvailabilityTrace("still", (Change(0.0, "add", ("a",)),), 100.0)
    with pytest.raises(InvalidInput, match="longer"):
        fit([trace])
