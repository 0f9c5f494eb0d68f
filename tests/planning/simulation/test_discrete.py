"""The discrete-event simulator: what can be told without its random delays."""

from __future__ import annotations

import numpy as np
import pytest

from data.errors import InvalidInput
from data.placement import Arrivals, Group, Placement, Shape
from planning.simulation.discrete import discrete_replay
from tests.planning.shared_fleets import arrivals, fleet

FLEET = fleet(["small", "small"], slo_scale=1.5)  # 150 ms for 100 ms of work
BOTH = Placement((Group(Shape(1, 1), (0, 1)),))


def test_requests_far_apart_are_served_and_close_ones_are_not() -> None:
    trace = Arrivals.of([0.0, 1.0, 1.01, 2.0], [0, 1, 0, 1])
    assert discrete_replay(FLEET, BOTH, trace).tolist() == [True, True, False, True]


def test_a_second_group_takes_what_the_first_cannot() -> None:
    trace = Arrivals.of([0.0, 0.01, 0.02], [0, 0, 0])
    twice = Placement((*BOTH.groups, *BOTH.groups))
    assert discrete_replay(FLEET, twice, trace).tolist() == [True, True, False]


def test_equal_seeds_give_equal_results() -> None:
    trace = arrivals(2, rate_rps=4.0)
    assert np.array_equal(discrete_replay(FLEET, BOTH, trace, 3), discrete_replay(FLEET, BOTH, trace, 3))


def test_a_model_without_profile_is_named() -> None:
    with pytest.raises(InvalidInput, match="small-0"):
        discrete_replay(FLEET, Placement((Group(Shape(16, 1), (0,)),)), arrivals(2))
