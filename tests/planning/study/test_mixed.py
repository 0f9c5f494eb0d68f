"""The fleet that a mixing policy holds along a trace."""

from __future__ import annotations

import pytest

from data.availability import AvailabilityTrace, Change
from planning.study.mixed import mixed_fleet
from tests.planning.test_mixing import solved_for

TRACE = AvailabilityTrace(
    "market",
    (
        Change(0.0, "add", ("a", "b", "c", "d", "e")),
        Change(1000.0, "remove", ("a", "b", "c", "d"), 30.0),
        Change(2000.0, "add", ("f", "g", "h", "i"), 30.0),
    ),
    3000.0,
)


def test_stand_ins_come_after_the_loss_and_go_when_spot_instances_are_back() -> None:
    fleet = mixed_fleet(TRACE, solved_for(0.001))
    held = {at_s: fleet.trace.usable(at_s) for at_s in (500.0, 1050.0, 1200.0, 2200.0)}
    assert held[500.0] == {"a", "b", "c", "d"}
    assert held[1050.0] == set()  # what is ordered at the notice is there 120 s later
    assert held[1200.0] == {"e", "on-demand-1", "on-demand-2", "on-demand-3"}
    assert len(held[2200.0]) == 4
    assert not any(name.startswith("on-demand") for name in held[2200.0])


def test_instance_seconds_are_those_of_the_trace() -> None:
    fleet = mixed_fleet(TRACE, solved_for(0.001))
    assert fleet.spot_s + fleet.on_demand_s == pytest.approx(60 * fleet.trace.instance_minutes)
    assert fleet.on_demand_s == pytest.approx(3 * (2060.0 - 1090.0))


def test_a_second_that_is_worth_little_buys_little() -> None:
    cheap, dear = (mixed_fleet(TRACE, solved_for(usd)) for usd in (1e-5, 1.0))
    assert cheap.spot_s + cheap.on_demand_s < dear.spot_s + dear.on_demand_s
    assert cheap.on_demand_s < dear.on_demand_s
