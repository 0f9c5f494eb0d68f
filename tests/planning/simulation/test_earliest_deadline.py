"""The serving rule: nobody is late who was taken, deadlines order the queue, and another replica is tried first."""

from __future__ import annotations

from data.placement import Arrivals, Group, Placement, Shape
from planning.simulation.earliest_deadline import serving_replay
from planning.simulation.requests import replay
from planning.simulation.tables import Tables
from tests.planning.shared_fleets import arrivals, fleet

FLEET = fleet(["small", "large"], slo_scale=3.0)  # 0.1 s within 0.3 s, 0.3 s within 0.9 s
TABLES = Tables.of(FLEET)
ONE = Group(Shape(1, 1), (0, 1))


def test_an_earlier_deadline_goes_first() -> None:
    trace = Arrivals.of([0.0, 0.01, 0.02], [1, 1, 0])
    short = Arrivals.of([0.0, 0.01, 0.12], [0, 1, 0])
    assert serving_replay(TABLES, Placement((ONE,)), trace).good.tolist() == [True, True, False]
    answer = serving_replay(TABLES, Placement((ONE,)), short)
    assert answer.good.tolist() == [True, True, False]
    queued = Arrivals.of([0.0, 0.01, 0.02], [0, 1, 0])
    answer = serving_replay(TABLES, Placement((ONE,)), queued)
    assert answer.good.all()
    assert answer.response_s[2] < answer.response_s[1]


def test_another_replica_is_tried_before_rejecting() -> None:
    trace = Arrivals.of([0.0, 0.3, 0.31, 0.32, 0.33], [0, 1, 0, 0, 0])
    two = Placement((ONE, Group(Shape(1, 1), (0,))))
    assert serving_replay(TABLES, two, trace).good.all()


def test_whoever_is_taken_is_in_time() -> None:
    trace = arrivals(2, duration_s=200.0, rate_rps=4.0)
    placement = Placement((ONE, Group(Shape(1, 2), (0, 1))))
    answer = serving_replay(TABLES, placement, trace)
    taken = answer.group >= 0
    assert (answer.response_s[taken] <= TABLES.slo_s[trace.models[taken]] + 1e-9).all()
    assert answer.good.sum() >= replay(TABLES, placement, trace).good.sum()
