"""Our system and the baselines on small fleets: nothing is lost, deadlines hold, and who pauses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from data.availability import AvailabilityTrace, Change
from data.placement import Shape
from planning.availability import steady
from planning.edge_weights import GptShape
from planning.simulation.serving_baselines import pinnable, simulate_reparallelization, simulate_rerouting
from planning.simulation.serving_perennial import Charges, Policy, Target, simulate_perennial
from planning.simulation.serving_spotserve import StaticFleet
from planning.spot_policy import Load, build, gamma_arrivals, published_policy
from planning.static_batch import StaticBatchProfile
from planning.step_costs import StepCosts


def fixed(table: Mapping[int, Target]) -> Policy:
    """What a table says for the most instances it knows that are there."""

    def choose(instances: int, _now: Target | None) -> Target | None:
        known = [count for count in table if count <= instances]
        return table[max(known)] if known else None

    return choose


PROFILE = StaticBatchProfile(
    stored_layers=24,
    computed_layers=24,
    least_devices=4,
    most_shards=8,
    factor=1.0,
    prefill_hop_ms=0.0,
    decode_hop_ms=0.0,
    embed_ms=dict.fromkeys((1, 2, 4, 8), 0.1),
    layer_ms={(s, b): (40.0 / s + b, 4.0 / s + 0.1 * b) for s in (1, 2, 4, 8) for b in (1, 2, 4, 8)},
)
MODEL = GptShape(24, 1000, 4096, 640)
COSTS = StepCosts(PROFILE, MODEL)
ARRIVALS = np.arange(1, 250) * 1.5
TABLE = fixed(
    {
        1: (Shape(shards=4, stages=1), 1),
        2: (Shape(shards=8, stages=1), 1),
        3: (Shape(shards=4, stages=1), 3),
        4: (Shape(shards=8, stages=1), 2),
    }
)


def _names(*numbers: int) -> tuple[str, ...]:
    return tuple(f"node-{number}" for number in numbers)


def _trace(*changes: Change) -> AvailabilityTrace:
    return AvailabilityTrace("test", changes, 400.0)


CHANGING = _trace(
    Change(0.0, "add", _names(0, 1, 2, 3)),
    Change(60.0, "remove", _names(0), 30.0),
    Change(75.0, "remove", _names(1), 30.0),
    Change(150.0, "add", _names(4, 5), 30.0),
    Change(220.0, "remove", _names(2, 3, 4), 30.0),
    Change(300.0, "remove", _names(5), 30.0),
    Change(340.0, "add", _names(6, 7), 30.0),
)


@pytest.mark.parametrize(
    "charges",
    [Charges(), Charges(residency=False, mapping=False), Charges(arranger=False), Charges(continuous=False)],
    ids=["all", "cold", "replaying", "whole"],
)
def test_every_request_is_done_on_a_fleet_that_also_vanishes(charges: Charges) -> None:
    outcome = simulate_perennial(COSTS, CHANGING, ARRIVALS, TABLE, charges)
    assert np.isfinite(outcome.done_s).all()
    assert (outcome.latency_s >= COSTS.least_s(Shape(shards=8, stages=1)) - 1e-9).all()
    # Between the last loss and the addition nobody serves, and weights come from disk afterwards.
    assert not ((outcome.done_s > 300.0) & (outcome.done_s < 345.0)).any()


def test_more_replicas_of_one_shape_disturb_nobody() -> None:
    grow = _trace(Change(0.0, "add", _names(0, 1, 2)), Change(100.0, "add", _names(3, 4), 30.0))
    policy = fixed({count: (Shape(shards=4, stages=1), count) for count in range(1, 6)})
    (change,) = simulate_perennial(COSTS, grow, ARRIVALS, policy).transitions
    assert change.ready_s == change.stop_s
    assert change.shape == (5, 1, 4)


def test_a_planned_loss_costs_a_pause_and_no_prefill() -> None:
    shrink = _trace(Change(0.0, "add", _names(0, 1, 2)), Change(100.0, "remove", _names(2), 30.0))
    policy = fixed({count: (Shape(shards=4, stages=1), count) for count in range(1, 4)})
    still = simulate_perennial(COSTS, _trace(Change(0.0, "add", _names(0, 1, 2))), ARRIVALS, policy)
    moved = simulate_perennial(COSTS, shrink, ARRIVALS, policy)
    lost = simulate_perennial(COSTS, shrink, ARRIVALS, policy, Charges(arranger=False))
    assert moved.transitions[0].ready_s <= 100.0
    assert still.latency_s.max() <= moved.latency_s.max() <= lost.latency_s.max()


@pytest.mark.parametrize("fill", [False, True])
def test_baselines_finish_what_can_be_finished(fill: bool) -> None:
    fleet = StaticFleet(PROFILE, MODEL, load_s=20.0)
    restart = simulate_reparallelization(fleet, CHANGING, ARRIVALS, 0.5, fill=fill)
    assert np.isfinite(restart.done_s).all()
    assert all(one.ready_s - one.stop_s >= 20.0 for one in restart.transitions)
    config = next(one for one in pinnable(fleet, 4) if (one.stages, one.shards) == (1, 4))
    routed = simulate_rerouting(fleet, CHANGING, ARRIVALS, config, fill=fill)
    assert np.isfinite(routed.done_s).all()


def test_a_book_answers_every_state_and_says_why() -> None:
    process = steady(6, 1e-4, 1e-3)
    for rule in ("optimal", "myopic", "hysteresis"):
        book = build(COSTS, process, Load(0.6, 0.1), rule)
        now = None
        for instances in (3, 4, 5, 6, 5, 3, 2, 1):
            now = book.target(instances, now)
            assert now is not None
            assert now[0].devices * now[1] <= 4 * instances
        assert book.target(0, now) is None
    assert "one less" in book.explain(6)
    optimal = build(COSTS, process, Load(0.6, 0.1))
    assert optimal.solution.average <= book.solution.average + 1e-9


def test_arrivals_have_the_coefficient_of_variation_asked_for() -> None:
    gaps = np.diff(gamma_arrivals(0, Load(2.0, 3.0), 40_000))
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.1)
    assert gaps.mean() == pytest.approx(0.5, rel=0.1)


def test_the_published_choice_as_a_policy() -> None:
    policy = published_policy(PROFILE, 0.5)
    chosen = policy(4, None)
    assert chosen is not None
    assert chosen[0].devices * chosen[1] <= 16
    assert policy(0, None) is None
    assert (
        replace(COSTS, plain_prefill=True).times(Shape(shards=8, stages=1)).through_s[4]
        > COSTS.times(Shape(shards=8, stages=1)).through_s[4]
    )
