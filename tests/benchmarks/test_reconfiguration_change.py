from itertools import pairwise
from typing import Any

import pytest

from benchmarks.reconfiguration.bars import bars, missed
from benchmarks.reconfiguration.change import Moments, Quiet, seen
from benchmarks.reconfiguration.crash import Kill, restored_s
from benchmarks.reconfiguration.planned import possible, with_link
from benchmarks.reconfiguration.timeline import Timeline
from serving.requests import Event

STEP_S = 0.01
SECONDS = {"prepare": 0.5, "copy": 0.2, "pause": 0.01, "transfer": 0.05, "total": 0.56}


def moment(kind: str, time_s: float, **data: Any) -> Event:
    return Event(sequence=1, time_s=time_s, kind=kind, data=data)


def paced(*, stop_s: float, go_s: float, step_after_s: float = STEP_S) -> Timeline:
    """A token every `STEP_S` from 0 to `stop_s`, and one every `step_after_s` from `go_s` to 6."""
    timeline, time_s = Timeline("r"), 0.0
    while time_s < 6.0:
        timeline.note(time_s, len(timeline.times_s), 1)
        after = time_s + (step_after_s if time_s >= go_s else STEP_S)
        time_s = go_s if time_s < go_s and after > stop_s + 1e-9 else after
    return timeline


def test_moments_are_counted_back_from_the_layout_and_of_the_last_attempt() -> None:
    events = [
        moment("reconfiguration_started", 100.0),
        moment("reconfiguration_failed", 101.0),
        moment("reconfiguration_started", 102.0),
        moment("layout", 103.0, seconds=SECONDS),
    ]
    moments = Moments.of(events, clock_offset_s=100.0)
    assert moments.started_s == pytest.approx(2.0)
    assert moments.paused_s == pytest.approx(2.94)
    assert moments.in_force_s == pytest.approx(3.0)


def test_what_clients_saw_of_a_change() -> None:
    timelines = [paced(stop_s=2.94, go_s=3.01) for _ in range(4)]
    found = seen(timelines, Moments(2.4, 2.94, 3.0), Quiet((0.0, 2.0), (4.0, 6.0)))
    assert found["requests"] == 4
    assert found["gap_ms"]["longest"] == found["gap_ms"]["at"] == pytest.approx(70, abs=1)
    assert found["gap_ms"]["before"] == found["gap_ms"]["after"] == found["gap_ms"]["quiet"] == pytest.approx(10)
    assert found["preparing_share"] == pytest.approx(1.0, rel=1e-3)
    clocks = found["clocks_s"]
    assert clocks["state_restored"] == pytest.approx(0.06)
    assert clocks["first_token"] == clocks["first_token_of_all"] == pytest.approx(0.07)
    assert clocks["service_level"] == clocks["peak_throughput"] == pytest.approx(0.07)


def test_a_slower_layout_is_measured_against_its_own_pace() -> None:
    timelines = [paced(stop_s=2.94, go_s=3.01, step_after_s=2 * STEP_S)]
    found = seen(timelines, Moments(2.4, 2.94, 3.0), Quiet((0.0, 2.0), (4.0, 6.0)))
    assert found["step_ms"] == {"before": pytest.approx(10), "after": pytest.approx(20)}
    assert found["clocks_s"]["peak_throughput"] == pytest.approx(0.07)


def test_a_preparation_of_a_few_steps_says_nothing_about_throughput() -> None:
    found = seen([paced(stop_s=2.94, go_s=3.01)], Moments(2.9, 2.94, 3.0), Quiet((0.0, 2.0), (4.0, 6.0)))
    assert found["preparing_share"] is None


def test_a_request_that_never_went_on_has_no_clock_of_all() -> None:
    stuck = paced(stop_s=2.94, go_s=9.0)
    found = seen([paced(stop_s=2.94, go_s=3.01), stuck], Moments(2.4, 2.94, 3.0), Quiet((0, 2), (4, 6)))
    assert found["clocks_s"]["first_token"] == pytest.approx(0.07)
    assert found["clocks_s"]["first_token_of_all"] is None


def test_state_is_restored_with_the_recovery_that_came_before_the_first_token() -> None:
    one = paced(stop_s=2.0, go_s=3.0)
    late, early = moment("layout", 3.5), moment("layout", 2.6)
    assert restored_s(Kill(2.0, 3.2, ("r",), (early, late)), [one], 0.0) == 2.6
    assert restored_s(Kill(2.0, 3.2, ("r",), (late,)), [one], 0.0) == pytest.approx(3.0)


def test_steps_that_need_more_gpus_are_left_out() -> None:
    assert possible(1)[0] == []
    taken, missing = possible(2)
    assert {step.name for step in missing} == {"TP4→TP2", "TP2→TP4"}
    for steps in (taken, possible(4)[0]):
        assert all(one.after == two.before for one, two in pairwise(steps)), "a chain has no holes"
    assert possible(4)[1] == []


def record(**changes: Any) -> dict[str, Any]:
    moved = with_link({"excess": 0.01, "weights_rate": 80.0, "kv_rate": None}, 100.0)
    whole = {"lost_tokens": 0, "duplicated_tokens": 0, "errors": []}
    base = {"case": "planned", "name": "TP2→TP1", "asked": True, "gap_ms": {"longest": 40.0}, "preparing_share": 0.95}
    return {**base, "bytes": moved, **whole, **changes}


def test_a_record_within_all_bars_misses_nothing() -> None:
    assert len(bars(record())) == 4
    assert missed([record(), {"case": "kill", "name": "x", "skipped": "no GPU"}]) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"gap_ms": {"longest": 50.1}}, "longest gap"),
        ({"preparing_share": 0.89}, "throughput"),
        ({"bytes": {"excess": 0.03}}, "bytes"),
        ({"bytes": {"excess": None}}, "bytes"),
        ({"bytes": {"excess": 0.0, "kv_link_share": 0.59, "weights_link_share": 0.9}}, "rate"),
        ({"lost_tokens": 1}, "lost"),
        ({"duplicated_tokens": 1}, "duplicated"),
        ({"errors": ["one"]}, "errors"),
    ],
)
def test_each_miss_is_seen(changes: dict[str, Any], what: str) -> None:
    (bar,) = missed([record(**changes)])
    assert what in bar.what


def test_a_case_that_failed_is_a_miss() -> None:
    assert len(missed([{"case": "kill", "name": "kill", "failed": "TimeoutError"}])) == 1
