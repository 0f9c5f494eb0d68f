from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InvalidInput
from data.synthesis import Fixed, Lengths, LogNormal, Uniform, gamma_gaps, synthetic_workload

seeds = st.integers(0, 2**32)
cvs = st.floats(0.1, 6.0)
rates = st.floats(0.01, 1000.0)


@given(seeds, cvs, rates)
def test_the_measured_cv_is_the_requested_one(seed: int, cv: float, rate_rps: float) -> None:
    workload = synthetic_workload(seed, requests=500, rate_rps=rate_rps, cv=cv, inputs=Fixed(512), outputs=Fixed(128))
    assert workload.cv == pytest.approx(cv, rel=1e-9)
    assert workload.rate_rps == pytest.approx(rate_rps, rel=1e-9)
    assert len(workload.requests) == 500
    assert workload.requests[0].arrival_s == 0


@given(seeds, cvs)
@settings(max_examples=50)
def test_an_unfitted_sample_is_within_its_sampling_error(seed: int, cv: float) -> None:
    count = 40_000
    gaps = gamma_gaps(np.random.default_rng(seed), gaps=count, rate_rps=2.0, cv=cv, exact=False)
    error = math.sqrt((1 + cv**2) / (2 * count))  # relative standard error of a Gamma sample's CV
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=6 * error)
    assert gaps.mean() == pytest.approx(0.5, rel=6 * cv / math.sqrt(count))


@given(seeds, cvs)
@settings(max_examples=50)
def test_fitting_changes_little(seed: int, cv: float) -> None:
    """The fitted gaps are the drawn ones under a monotone map that is close to the identity."""
    drawn, fitted = (
        gamma_gaps(np.random.default_rng(seed), gaps=20_000, rate_rps=1.0, cv=cv, exact=exact)
        for exact in (False, True)
    )
    assert (np.diff(fitted[np.argsort(drawn)]) >= 0).all()
    large = drawn > drawn.mean()
    error = math.sqrt((1 + cv**2) / (2 * len(drawn)))
    assert np.median(fitted[large] / drawn[large]) == pytest.approx(1, abs=10 * error)


def test_a_poisson_process_is_the_gamma_process_of_cv_1() -> None:
    gaps = np.sort(gamma_gaps(np.random.default_rng(5), gaps=20_000, rate_rps=4.0, cv=1.0, exact=False))
    expected = 1 - np.exp(-4.0 * gaps)
    assert np.abs(expected - np.arange(1, 20_001) / 20_000).max() < 1.63 / math.sqrt(20_000)  # Kolmogorov, 1 %


def test_no_variation_means_equal_gaps() -> None:
    assert gamma_gaps(np.random.default_rng(0), gaps=3, rate_rps=4.0, cv=0.0).tolist() == [0.25] * 3


@pytest.mark.parametrize("count", [0, 1])
def test_a_workload_may_have_no_gap(count: int) -> None:
    workload = synthetic_workload(0, requests=count, rate_rps=1, cv=1, inputs=Fixed(1), outputs=Fixed(1))
    assert len(workload.requests) == count


def test_too_few_gaps_for_a_cv() -> None:
    with pytest.raises(InvalidInput, match="draw more than 37 or exact=False"):
        gamma_gaps(np.random.default_rng(0), gaps=37, rate_rps=1.0, cv=6.0)


@pytest.mark.parametrize(("rate_rps", "cv"), [(0.0, 1.0), (-1.0, 1.0), (1.0, -0.1), (math.nan, 1.0), (1.0, math.nan)])
def test_impossible_arrivals_are_refused(rate_rps: float, cv: float) -> None:
    with pytest.raises(InvalidInput, match="positive rate"):
        gamma_gaps(np.random.default_rng(0), gaps=10, rate_rps=rate_rps, cv=cv)


@given(seeds, st.sampled_from([Fixed(7), Uniform(3, 9), LogNormal(100.0, 1.0, 400)]))
def test_lengths_stay_in_their_bounds_and_repeat(seed: int, lengths: Lengths) -> None:
    drawn = lengths.draw(np.random.default_rng(seed), 200)
    assert drawn == lengths.draw(np.random.default_rng(seed), 200)
    low, high = {Fixed: (7, 7), Uniform: (3, 9), LogNormal: (1, 400)}[type(lengths)]
    assert low <= min(drawn) <= max(drawn) <= high


def test_lengths_follow_their_distribution() -> None:
    generator = np.random.default_rng(1)
    assert set(Uniform(3, 9).draw(generator, 500)) == set(range(3, 10))
    logs = np.log(LogNormal(1000.0, 0.5, 10**6).draw(generator, 20_000))
    assert logs.mean() == pytest.approx(math.log(1000), abs=0.02)
    assert logs.std() == pytest.approx(0.5, abs=0.02)


def test_equal_seeds_give_equal_workloads() -> None:
    first, again, other = (
        synthetic_workload(seed, requests=50, rate_rps=1, cv=2, inputs=Uniform(1, 9), outputs=LogNormal(20, 1, 99))
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other
