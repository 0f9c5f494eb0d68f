from __future__ import annotations

from math import exp, factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.demand import Demand, History
from planning.drift import LEVEL, at_least, cv_p, drifts, length_p, rate_p

RATES, CVS = st.floats(0.01, 50), st.floats(0.2, 5)


def told(model: str = "a", rate_rps: float = 1.0, cv: float = 1.0, *, requests: int = 0) -> Demand:
    return Demand(model, 5.0, rate_rps, cv, 60, 40, requests)


def drawn(seed: int, duration_s: float, *demands: Demand, output_tokens: float = 40) -> History:
    """Stationary Gamma renewals of every demand, with geometric lengths."""
    generator = np.random.default_rng(seed)
    rows = []
    for one in demands:
        shape, before_s = one.cv**-2, 20 * one.cv**2 / one.rate_rps
        count = int(one.rate_rps * duration_s * 3 + 60 * one.cv**2 + 60)
        times_s = np.cumsum(generator.gamma(shape, 1 / shape / one.rate_rps, count)) - before_s
        for at_s in times_s[(times_s > 0) & (times_s < duration_s)]:
            lengths = generator.geometric(1 / one.input_tokens), generator.geometric(1 / output_tokens)
            rows.append((float(at_s), one.model, *map(int, lengths)))
    return History.of([one.model for one in demands], rows)


@pytest.mark.parametrize("cv", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("measured", [False, True])
def test_noise_raises_no_more_alarms_than_the_level_allows(cv: float, measured: bool) -> None:
    assumed = [told("a", 1.0, cv), told("b", 0.3, 1.0)]
    alarms = 0
    for seed in range(100):
        recent = drawn(seed, 240.0, *assumed)
        counted_on = [drawn(1000 + seed, 240.0, *assumed).measured(one) for one in assumed] if measured else assumed
        alarms += bool(drifts(counted_on, recent))
    assert alarms <= 4  # of Binomial(100, 0.01), more is one case in a thousand


@pytest.mark.parametrize("cv", [0.3, 1.0, 3.0])
def test_what_drifts_is_found_and_named(cv: float) -> None:
    assumed = [told("a", 1.0, cv), told("b", 0.5)]
    (found,) = drifts(assumed, drawn(1, 1200.0, told("a", 2.5, cv), assumed[1]))
    assert (found.model, found.figure, found.assumed) == ("a", "requests/s", 1.0)
    assert str(found).startswith("requests/s of a: 1 assumed, 2.")
    (gone,) = drifts(assumed, drawn(2, 1200.0, told("a", 0.2, cv), assumed[1]))
    assert gone.recent < 0.5
    (longer,) = drifts(assumed, drawn(3, 1200.0, *assumed, output_tokens=90))[:1]
    assert longer.figure == "output tokens"


def test_bursts_are_no_change_of_the_rate() -> None:
    found = [one for seed in range(20) for one in drifts([told()], drawn(seed, 2000.0, told(cv=4.0)))]
    assert {one.figure for one in found} == {"CV of arrivals"}


def test_a_model_that_nobody_asks_for_any_more_has_drifted() -> None:
    recent = drawn(0, 600.0, told("b"))
    assert [one.figure for one in drifts([told("a"), told("b")], recent)] == ["requests/s"]
    asked_now = drifts([told("a", 0.0), told("b")], drawn(0, 600.0, told("a"), told("b")))
    assert [(one.model, one.figure) for one in asked_now] == [("a", "requests/s")]


@given(st.integers(0, 60), st.floats(0.1, 40))
def test_counts_at_cv_1_are_poisson(count: int, expected: float) -> None:
    below = sum(exp(-expected) * expected**n / factorial(n) for n in range(count))
    assert at_least(count, expected, 1.0) == pytest.approx(1 - below, abs=1e-9)


@given(st.integers(0, 200), st.floats(0.1, 100), CVS)
def test_chances_of_counts_fall_from_one(count: int, expected: float, cv: float) -> None:
    assert at_least(0, expected, cv) == 1
    assert 0 <= at_least(count + 1, expected, cv) <= at_least(count, expected, cv) + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.floats(5, 60), st.floats(0.4, 3))
def test_mean_counts_are_those_of_a_stationary_process(expected: float, cv: float) -> None:
    most = int(10 * expected * (1 + cv) ** 2) + 50
    assert sum(at_least(n, expected, cv) for n in range(1, most)) == pytest.approx(expected, rel=1e-6)


@given(RATES, CVS, st.integers(0, 500), st.floats(1, 1000), st.floats(0.1, 100))
def test_the_unit_of_time_does_not_matter(rate: float, cv: float, count: int, span_s: float, unit: float) -> None:
    p = rate_p(told(rate_rps=rate, cv=cv), count, span_s, cv)
    assert 0 <= p <= 1
    if rate * span_s / 2 > 1:  # else the window itself is a unit
        assert rate_p(told(rate_rps=rate / unit, cv=cv), count, span_s * unit, cv) == pytest.approx(p, abs=1e-9)


@given(RATES, CVS, st.integers(1, 10**6), st.floats(0.9, 1.1))
def test_what_lies_within_the_tolerance_is_no_drift(rate: float, cv: float, requests: int, off: float) -> None:
    demand = told(rate_rps=rate, cv=cv, requests=requests)
    span_s = requests / rate / off
    assert rate_p(demand, requests, span_s, cv) == 1
    assert cv_p(demand, cv * off, requests) == 1
    assert length_p(60, requests, np.full(30, 60 * off)) == 1


def test_less_data_means_less_certainty() -> None:
    twice = [rate_p(told(), 2 * count, count, 1.0) for count in (5, 50, 500)]
    assert twice == sorted(twice, reverse=True)
    assert twice[0] > LEVEL > twice[1]
    assert length_p(60, 10, np.array([100.0, 150, 120] * 10)) > length_p(60, 0, np.array([100.0, 150, 120] * 10))


def test_arrivals_by_the_clock_have_not_drifted_from_themselves() -> None:
    recent = History.of(["a"], [(1.0 * at, "a", 60, 40) for at in range(200)])
    assert not drifts([recent.measured(told())], recent)
