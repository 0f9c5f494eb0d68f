"""The published system along traces: what is conserved, when it stops, and what a constant fleet gives."""

from __future__ import annotations

import numpy as np
import pytest

from data.availability import AvailabilityTrace, Change
from planning.edge_weights import GptShape
from planning.simulation.serving import FleetEvent, constant, events_of, merged
from planning.simulation.serving_spotserve import StaticFleet, simulate_constant, simulate_spotserve
from planning.static_batch import StaticBatchProfile, StaticConfig

# A model of 8 layers that needs 2 devices; times chosen for the test.
PROFILE = StaticBatchProfile(
    stored_layers=8,
    computed_layers=8,
    least_devices=2,
    most_shards=2,
    factor=1.0,
    prefill_hop_ms=0.0,
    decode_hop_ms=0.0,
    embed_ms={1: 0.0, 2: 0.0, 4: 0.0},
    layer_ms={(shards, batch): (100.0 / shards, 4.0 / shards) for shards in (1, 2) for batch in (1, 2, 4)},
)
FLEET = StaticFleet(PROFILE, GptShape(8, 1000, 512, 640), gpus_per_host=2, engine_start_s=2.0, load_s=10.0)
ARRIVALS = np.arange(1, 200) * 1.1


def _trace(*changes: Change, end_s: float = 260.0) -> AvailabilityTrace:
    return AvailabilityTrace("test", changes, end_s)


def _names(*numbers: int) -> tuple[str, ...]:
    return tuple(f"node-{number}" for number in numbers)


@pytest.mark.parametrize("fill", [False, True])
def test_every_request_is_done_once_whatever_happens(fill: bool) -> None:
    trace = _trace(
        Change(0.0, "add", _names(0, 1, 2, 3)),
        Change(60.0, "remove", _names(0), 30.0),
        Change(120.0, "add", _names(4, 5), 30.0),
        Change(180.0, "remove", _names(1, 4), 30.0),
    )
    outcome = simulate_spotserve(FLEET, trace, ARRIVALS, 1.0, fill=fill)
    assert np.isfinite(outcome.done_s).all()
    assert (outcome.latency_s >= 128 * PROFILE.decode_ms(StaticConfig(1, 1, 2, 1, 1, 1)) / 1e3).all()
    assert outcome.transitions
    assert all(one.ready_s >= one.stop_s + FLEET.engine_start_s - 1e-9 for one in outcome.transitions)


def test_a_loss_is_prepared_for_before_its_deadline() -> None:
    trace = _trace(Change(0.0, "add", _names(0, 1)), Change(100.0, "remove", _names(1), 30.0))
    (change,) = simulate_spotserve(FLEET, trace, ARRIVALS[:50], 1.0, fill=False).transitions
    assert 70.0 <= change.stop_s <= 100.0


def test_without_instances_requests_stay_unfinished_and_are_counted() -> None:
    trace = _trace(Change(0.0, "add", _names(0)), Change(100.0, "remove", _names(0), 30.0))
    summary = simulate_spotserve(FLEET, trace, ARRIVALS, 1.0, fill=False).summary()
    assert summary.requests == len(ARRIVALS)
    assert summary.unfinished > 50
    assert summary.p99_s == np.inf


def test_a_constant_fleet_serves_one_request_in_the_time_of_a_batch_of_one() -> None:
    config = StaticConfig(1, 1, 2, 4, 1, 1)
    outcome = simulate_constant(FLEET, config, [10.0], 60.0, fill=False)
    assert outcome.latency_s[0] == pytest.approx(PROFILE.latency_ms(StaticConfig(1, 1, 2, 1, 1, 1)) / 1e3, abs=0.03)


def test_a_loss_soon_after_an_addition_is_merged_into_it() -> None:
    trace = _trace(Change(0.0, "add", _names(0, 1)), Change(50.0, "add", _names(2)), Change(80.0, "remove", _names(0)))
    assert merged(events_of(trace))[1:] == (FleetEvent(50.0, _names(2), _names(0)),)
    assert len(events_of(constant(3, 10.0))) == 1
