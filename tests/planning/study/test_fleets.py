"""Fleets made from others."""

from __future__ import annotations

from data.availability import AvailabilityTrace, Change
from planning.study.fleets import capped, with_fallback


def _names(*numbers: int) -> tuple[str, ...]:
    return tuple(f"node-{number}" for number in numbers)


TRACE = AvailabilityTrace(
    "test",
    (
        Change(0.0, "add", _names(0, 1, 2, 3)),
        Change(100.0, "remove", _names(0, 1), 30.0),
        Change(400.0, "add", _names(4, 5, 6), 30.0),
        Change(700.0, "remove", _names(2), 30.0),
    ),
    1000.0,
)


def test_a_cap_takes_no_more_and_replaces_what_is_lost_when_there_is_more() -> None:
    few = capped(TRACE, 2)
    assert few.most == 2
    assert few.usable(99.0) == {"node-0", "node-1"}
    assert few.usable(189.0) == set()
    assert few.usable(190.0) == {"node-2", "node-3"}  # 120 s after the notice at 70 s
    assert few.usable(790.0) == {"node-3", "node-4"}
    assert capped(TRACE, 10).changes == TRACE.changes


def test_on_demand_instances_stand_in_until_spot_ones_have_returned() -> None:
    trace, spent_s = with_fallback(TRACE, 4)
    assert len(trace.usable(150.0)) == 2
    assert len(trace.usable(200.0)) == 4
    assert len(trace.usable(500.0)) == 5
    assert spent_s == 2 * (460.0 - 190.0)
