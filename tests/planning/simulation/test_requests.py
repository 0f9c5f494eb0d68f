"""The compiled simulator does what its docstring says, request by request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InvalidInput
from data.placement import Arrivals, Group, Placement, Schedule, Shape
from planning.simulation.requests import OVERHEAD_S, replay
from planning.simulation.tables import Tables
from tests.planning.shared_fleets import arrivals, fleet

FLEET = fleet(["small", "large", "small", "large"], devices=64)
TABLES = Tables.of(FLEET)
SHAPES = st.sampled_from(FLEET.shapes)


def by_hand(placement: Placement, trace: Arrivals) -> list[tuple[float, int]]:
    """The rules of the fast simulator, spelled out."""
    clocks = [[0.0] * group.shape.stages for group in placement.groups]
    result = []
    for now, model in zip(trace.times_s.tolist(), trace.models.tolist(), strict=True):
        holding = [g for g, group in enumerate(placement.groups) if model in group.models]
        if not holding:
            result.append((-1.0, -1))
            continue
        chosen = min(holding, key=lambda g: clocks[g][-1])
        shape = placement.groups[chosen].shape
        profile = FLEET.profile(model, shape)
        assert profile is not None
        end, ends = now, []
        for clock, latency_s in zip(clocks[chosen], profile.latency_s, strict=True):
            end = max(end, clock) + float(np.float32(latency_s * (1 + 0.009 * shape.stages)))
            ends.append(end)
        took = end + OVERHEAD_S - now
        met = took <= float(np.float32(FLEET.models[model].slo_s))
        if met:
            clocks[chosen] = ends
        result.append((took if met else -1.0, chosen))
    return result


GROUPS = st.builds(
    lambda shape, models: Group(shape, tuple(sorted(models))), SHAPES, st.sets(st.integers(0, 3), max_size=4)
)


@settings(deadline=None, max_examples=60)
@given(groups=st.lists(GROUPS, min_size=1, max_size=5), seed=st.integers(0, 20))
def test_every_request_fares_as_by_hand(groups: list[Group], seed: int) -> None:
    placement = Placement(tuple(groups))
    trace = arrivals(4, seed=seed, duration_s=15.0, rate_rps=3.0)
    outcome = replay(TABLES, placement, trace)
    assert list(zip(outcome.response_s.tolist(), outcome.group.tolist(), strict=True)) == by_hand(placement, trace)


def test_a_switch_serves_the_first_arrival_after_its_time_on_idle_groups() -> None:
    one = Placement((Group(Shape(1, 1), (0,)),))
    two = Placement((Group(Shape(1, 1), (2,)),))
    trace = Arrivals.of([0.0, 1.0, 1.0, 2.0, 2.0], [0, 0, 2, 0, 2])
    good = replay(TABLES, Schedule((0.0, 1.0), (one, two)), trace).good
    assert good.tolist() == [True, True, False, False, True]


def test_two_switches_at_once_are_two_requests_apart() -> None:
    empty, held = Placement((Group(Shape(1, 1), ()),)), Placement((Group(Shape(1, 1), (0,)),))
    trace = Arrivals.of([0.0, 5.0, 6.0], [0, 0, 0])
    assert replay(TABLES, Schedule((0.0, 1.0, 2.0), (empty, empty, held)), trace).good.tolist() == [False, False, True]


def test_attainment_leaves_out_both_ends() -> None:
    placement = Placement((Group(Shape(1, 1), (0,)),))
    trace = Arrivals.of(np.arange(100.0), [1] * 20 + [0] * 60 + [1] * 20)
    outcome = replay(TABLES, placement, trace)
    assert outcome.attainment(trace) == pytest.approx(60 / 80)
    assert outcome.attainment(trace, trim_s=0.0) == pytest.approx(0.6)


def test_a_shape_that_nobody_was_profiled_in_is_named() -> None:
    with pytest.raises(InvalidInput, match=r"\(3,1\)"):
        replay(TABLES, Placement((Group(Shape(3, 1), (0,)),)), arrivals(4))


def test_arrivals_out_of_order_are_refused() -> None:
    with pytest.raises(InvalidInput, match="in order"):
        Arrivals.of([1.0, 0.5], [0, 0])
