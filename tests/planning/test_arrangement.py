"""The time before devices go is used, and never exceeded."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planning.arrangement import Arrangement, Carried, Timing, arrange

seconds = st.floats(0.001, 0.1)
timings = st.builds(Timing, step_s=seconds, change_s=st.floats(0.0, 0.5), move_s=st.floats(0.0, 1e-3), replay_s=seconds)
requests_of_a_replica = st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 200)), max_size=8, unique=True).map(
    lambda pairs: [Carried(key, cached, left) for key, (cached, left) in enumerate(pairs)]
)


def needed_s(requests: list[Carried], timing: Timing, decode_s: float) -> float:
    """Until everybody who decodes past `decode_s` has been moved."""
    moving = timing.move_s if timing.move_s < timing.replay_s else 0.0
    staying = [one for one in requests if one.left_tokens * timing.step_s > decode_s]
    return decode_s + timing.change_s + moving * sum(one.cached_tokens + decode_s / timing.step_s for one in staying)


def moved_s(requests: list[Carried], timing: Timing, found: Arrangement) -> float:
    moved = [one for one in requests if one.key in found.move]
    cached = sum(one.cached_tokens + found.decode_s / timing.step_s for one in moved)
    return found.decode_s + timing.change_s + timing.move_s * cached


@given(requests_of_a_replica, timings, st.floats(0.0, 20.0), st.one_of(st.just(math.inf), st.floats(0.0, 5.0)))
def test_everybody_has_one_fate_and_nothing_is_planned_past_the_end(
    requests: list[Carried], timing: Timing, left_s: float, most_s: float
) -> None:
    found = arrange(requests, timing, left_s, most_s)
    assert sorted([*found.finish, *found.move, *found.replay]) == [one.key for one in requests]
    assert 0 <= found.decode_s <= most_s
    if found.move or found.decode_s:
        assert moved_s(requests, timing, found) <= left_s + 1e-6


@given(requests_of_a_replica, timings, st.floats(0.0, 20.0))
def test_nobody_is_replayed_who_could_be_moved_by_stopping_sooner(
    requests: list[Carried], timing: Timing, left_s: float
) -> None:
    found = arrange(requests, timing, left_s)
    if timing.move_s < timing.replay_s and needed_s(requests, timing, 0.0) <= left_s - 1e-6:
        assert not found.replay


@given(requests_of_a_replica, timings, st.floats(0.0, 20.0), st.floats(0.001, 5.0))
def test_no_later_end_would_do(requests: list[Carried], timing: Timing, left_s: float, more_s: float) -> None:
    found = arrange(requests, timing, left_s)
    assert needed_s(requests, timing, found.decode_s + more_s) > left_s - 1e-6


@pytest.mark.parametrize(
    ("left_s", "decode_s", "finish", "move", "replay"),
    [
        (10.0, 9.0, {0, 1}, set(), set()),  # both finish long before
        (2.0, 1.0, {0}, {1}, set()),  # moving the second takes no time to speak of
        (1.0, 0.0, set(), {0, 1}, set()),
        (0.9, 0.0, set(), set(), {0, 1}),
    ],
)
def test_of_a_short_and_a_long_request(
    left_s: float, decode_s: float, finish: set[int], move: set[int], replay: set[int]
) -> None:
    requests = [Carried(0, 100, 10), Carried(1, 100, 50)]
    found = arrange(requests, Timing(step_s=0.1, change_s=1.0, move_s=0.0, replay_s=0.01), left_s)
    assert found == Arrangement(decode_s, frozenset(finish), frozenset(move), frozenset(replay))


def test_the_longest_are_moved_where_not_all_can_be() -> None:
    requests = [Carried(0, 300, 500), Carried(1, 500, 500), Carried(2, 100, 500)]
    found = arrange(requests, Timing(step_s=0.1, change_s=0.0, move_s=0.001, replay_s=0.1), 0.65)
    assert (found.move, found.replay) == ({1, 2}, {0})


def test_nothing_is_moved_where_computing_is_quicker() -> None:
    found = arrange([Carried(0, 300, 500)], Timing(step_s=0.1, change_s=0.0, move_s=0.1, replay_s=0.001), 2.0)
    assert found == Arrangement(2.0, frozenset(), frozenset(), frozenset({0}))
