from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.demo.setting import CPU
from perennial.scenario import GPU, SHORT, Shape, scenario

shapes = st.sampled_from([Shape(), SHORT, GPU])


@given(st.integers(0, 10_000), shapes)
@settings(deadline=None, max_examples=60)
def test_the_fleet_stays_in_bounds_and_reaches_the_lower_one(seed: int, shape: Shape) -> None:
    live, path = shape.instances, []
    for action in scenario(seed, shape).actions:
        live += 1 if action.kind == "add" else -1
        path.append(live)
    assert min(path) == shape.least
    assert max(path) <= shape.most


@given(st.integers(0, 10_000), shapes)
@settings(deadline=None, max_examples=60)
def test_every_scenario_has_what_the_demo_promises(seed: int, shape: Shape) -> None:
    drawn = scenario(seed, shape)
    kinds = [action.kind for action in drawn.actions]
    assert (kinds.count("notice") >= 3, kinds.count("kill") >= 1, kinds.count("add") >= 2) == (True, True, True)
    assert len({arrival.request.request_id for arrival in drawn.arrivals}) == shape.requests
    assert all(before.time_s < after.time_s for before, after in pairwise(drawn.actions))
    assert all(before.time_s <= after.time_s for before, after in pairwise(drawn.arrivals))
    assert drawn.arrivals[-1].time_s >= drawn.actions[-1].time_s
    assert any(arrival.request.sampling.temperature for arrival in drawn.arrivals)
    assert any(not arrival.request.sampling.temperature for arrival in drawn.arrivals)


def test_a_seed_is_a_scenario() -> None:
    assert scenario(7, Shape()) == scenario(7, Shape())
    assert scenario(7, Shape()) != scenario(8, Shape())


def test_impossible_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 0"):
        scenario(0, Shape(instances=4, least=0, most=0))


def test_requests_fit_the_model() -> None:
    longest = CPU.shape.prompt_tokens[1] + CPU.shape.output_tokens[1]
    assert longest <= CPU.model["max_positions"]
    assert CPU.shape.vocab <= CPU.model["vocab"]
