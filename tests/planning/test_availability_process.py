"""The availability process: it is found again in what it generates, and its test tells others apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data.availability import AvailabilityTrace, Change
from data.errors import InvalidInput
from planning.availability import Process, fit, fit_p_value, generate

PROCESS = Process(20, 1e-4, 1.2e-3, {1: 0.7, 3: 0.3}, {1: 0.8, 2: 0.2})
LONG_S = 1e6


def test_generated_traces_have_the_rates_and_groups_of_their_process() -> None:
    trace = generate(PROCESS, 1, LONG_S, 10)
    found = fit([trace], most=20)
    assert found.loss_per_instance_s == pytest.approx(PROCESS.loss_per_instance_s, rel=0.1)
    assert found.gain_s == pytest.approx(PROCESS.gain_s, rel=0.1)
    assert found.loss_groups[3] == pytest.approx(0.3, abs=0.05)
    assert trace.most <= 20
    assert trace.changes == generate(PROCESS, 1, LONG_S, 10).changes


def test_the_test_of_the_fit_rejects_another_process() -> None:
    trace = generate(PROCESS, 2, LONG_S, 10)
    assert fit_p_value(PROCESS, [trace]) > 0.01
    assert fit_p_value(replace(PROCESS, gain_s=3e-3), [trace]) < 1e-4


def test_rates_never_leave_the_range() -> None:
    rates = PROCESS.rates()
    assert rates.shape == (21, 21)
    assert rates[20, :].sum() == pytest.approx(20 * PROCESS.loss_per_instance_s)
    assert rates[1, 0] == pytest.approx(PROCESS.loss_per_instance_s)  # a group of three takes the one there is


def test_a_trace_without_changes_cannot_be_fitted() -> None:
    trace = AvailabilityTrace("still", (Change(0.0, "add", ("a",)),), 100.0)
    with pytest.raises(InvalidInput, match="longer"):
        fit([trace])
