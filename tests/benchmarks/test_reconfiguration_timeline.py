import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.reconfiguration.timeline import (
    Arrivals,
    Timeline,
    continuity,
    gaps,
    longest_s,
    quantiles_ms,
    rate,
    stall_s,
    step_s,
)

STEP_S = 0.01


def steady(name: str = "r", *, begin_s: float = 0.0, steps: int = 100, ended: bool = False) -> Timeline:
    """One token every `STEP_S`."""
    timeline = Timeline(name, prompt_tokens=5)
    for step in range(steps):
        timeline.note(begin_s + step * STEP_S, step, 1)
    timeline.ended = ended
    return timeline


def interrupted(stop_s: float, go_s: float, until_s: float = 2.0) -> Timeline:
    """Steady but for a gap from `stop_s` to `go_s`."""
    timeline, time_s = Timeline("r"), 0.0
    while time_s <= until_s:
        timeline.note(time_s, len(timeline.times_s), 1)
        time_s = go_s if time_s < go_s and time_s + STEP_S > stop_s + 1e-9 else time_s + STEP_S
    return timeline


def test_the_gap_of_an_interruption_is_found_from_any_moment_within() -> None:
    timeline = interrupted(0.5, 0.8)
    assert longest_s([timeline], 0.6, 0.7) == pytest.approx(0.3)
    assert longest_s([timeline], 0.0, 2.0) == pytest.approx(0.3)
    assert longest_s([timeline], 0.9, 2.0) == pytest.approx(STEP_S)
    assert [gap.begin_s for gap in gaps(timeline, 0.6, 0.7)] == [pytest.approx(0.5)]


def test_a_gap_that_only_touches_the_interval_is_outside() -> None:
    timeline = Timeline("r", times_s=[0.0, 1.0, 2.0], indices=[0, 1, 2], counts=[1, 1, 1])
    assert [gap.begin_s for gap in gaps(timeline, 1.0, 2.0)] == [1.0]
    assert gaps(timeline, 2.0, 3.0) == []


def test_an_open_stall_counts_unless_the_request_has_ended() -> None:
    assert stall_s(steady(steps=11), 0.05, 3.0) == pytest.approx(2.9)
    assert stall_s(steady(steps=11, ended=True), 0.05, 3.0) == pytest.approx(STEP_S)


def test_the_step_is_per_token() -> None:
    pairs = Timeline("r", times_s=[0.0, 0.2, 0.4], indices=[0, 2, 4], counts=[2, 2, 2])
    assert step_s([pairs], 0.0, 1.0) == pytest.approx(0.1)
    assert math.isnan(step_s([pairs], 0.5, 1.0))


@given(st.floats(0.0, 0.3), st.floats(0.35, 0.98), st.integers(1, 5))
def test_the_rate_of_steady_requests_is_exact_in_every_interval(since_s: float, until_s: float, requests: int) -> None:
    timelines = [steady(f"r{number}", begin_s=-0.001 * number) for number in range(requests)]
    assert rate(timelines, since_s, until_s) == pytest.approx(requests / STEP_S, rel=1e-6)


def test_requests_that_follow_each_other_do_not_add_up_to_two() -> None:
    first, second = steady(steps=50, ended=True), steady(begin_s=0.5, steps=50)
    assert rate([first, second], 0.0, 0.99) == pytest.approx(1 / STEP_S, rel=0.03)


def test_a_rate_of_nothing_is_unknown() -> None:
    assert math.isnan(rate([], 0.0, 1.0))
    assert math.isnan(rate([steady()], 5.0, 6.0))


def test_the_pace_is_back_where_a_whole_window_keeps_it() -> None:
    timelines = [interrupted(0.5, 0.8)]
    full = 1 / STEP_S
    assert Arrivals(timelines).back_at_s(0.6, 0.5, 0.98 * full) == pytest.approx(0.8)
    assert Arrivals(timelines).back_at_s(0.1, 0.5, 0.98 * full) == pytest.approx(0.8), (
        "the window must not span the gap"
    )
    assert Arrivals(timelines).back_at_s(0.6, 0.5, 1.5 * full) is None
    assert Arrivals(timelines).back_at_s(1.9, 0.5, 0.5 * full) is None, "no whole window is left"


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20))
def test_consecutive_messages_lose_and_repeat_nothing(counts: list[int]) -> None:
    timeline, due = Timeline("r"), 0
    for number, count in enumerate(counts):
        timeline.note(float(number), due, count)
        due += count
    assert continuity([timeline]) == (0, 0)
    timeline.note(99.0, due + 3, 1)
    timeline.note(100.0, due, 1)
    assert continuity([timeline]) == (3, 4)


def test_tokens_by_a_time_and_requests_that_span_it() -> None:
    timeline = steady(steps=10, ended=True)
    assert timeline.tokens == 10
    assert timeline.tokens_by(0.035) == 4
    assert timeline.spans(0.05)
    assert not timeline.spans(0.5)
    assert not Timeline("empty").spans(0.0)


def test_quantiles() -> None:
    assert quantiles_ms([]) == {}
    assert quantiles_ms([0.001, 0.002, 0.003]) == {"p50": 2.0, "p99": 2.98, "max": 3.0}
