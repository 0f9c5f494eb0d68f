"""What is kept of a simulation."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planning.simulation.serving import Outcome, Transition
from planning.study.results import Result, finite, frontier, mean_interval, over_time, pooled

OUTCOME = Outcome(
    np.array([0.0, 10.0, 50.0, 90.0]),
    np.array([2.0, 14.0, 51.0, 120.0]),
    100.0,
    (Transition(40.0, 41.0, 44.5, (1, 2, 4), 3e9),),
    7.5,
)


def test_an_outcome_becomes_numbers_that_survive_json() -> None:
    found = Result.of("A", "perennial", 3, OUTCOME)
    assert (found.requests, found.unfinished, found.usd, found.moved_gb) == (4, 1, 7.5, 3.0)
    assert found.mean_s == pytest.approx((2 + 4 + 1 + 30) / 4)
    assert found.longest_pause_s == 3.5
    assert found.changes == [(40.0, 3.5, 3.0)]
    assert Result.from_json(json.loads(json.dumps(asdict(found)))) == found


def test_latency_over_time_is_by_arrival() -> None:
    assert over_time(OUTCOME, bins=2) == [(25.0, 3.0), (75.0, 15.5)]
    assert over_time(OUTCOME, bins=4) == [(12.5, 3.0), (62.5, 1.0), (87.5, 30.0)]


def test_seeds_are_pooled() -> None:
    first = Result.of("A", "perennial", 0, OUTCOME)
    found = pooled([first, replace(first, seed=1, p99_s=first.p99_s + 2, longest_pause_s=9.0)])
    assert found.p99_s == first.p99_s + 1
    assert found.longest_pause_s == 9.0
    low, high = found.interval_s
    # Student's t with one degree of freedom: 12.706 standard errors, of 1 each.
    assert (high - low) / 2 == pytest.approx(12.706, rel=1e-3)
    assert mean_interval([3.0]) == (3.0, 3.0)
    assert mean_interval([3.0, inf]) == (inf, inf)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=20))
def test_what_is_on_the_frontier_is_beaten_by_nothing(points: list[tuple[float, float]]) -> None:
    kept = frontier(points)
    assert set(kept) <= set(points)
    for usd, seconds in points:
        assert any(x <= usd and y <= seconds for x, y in kept)
    assert all(a[0] <= b[0] and a[1] > b[1] for a, b in pairwise(kept))


def test_json_gets_no_infinity() -> None:
    assert finite({"a": [1.0, inf], "b": (2, "x")}) == {"a": [1.0, None], "b": [2, "x"]}
