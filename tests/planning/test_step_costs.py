"""Costs of continuous batching from a static profile: agreement with the published formula, and geometry."""

from __future__ import annotations

import numpy as np
import pytest

from data.placement import Shape
from planning.edge_weights import GptShape
from planning.static_batch import StaticBatchProfile, StaticConfig
from planning.step_costs import MOST_GROUP, StepCosts

PROFILE = StaticBatchProfile(
    stored_layers=48,
    computed_layers=44,
    least_devices=12,
    most_shards=8,
    factor=1.1,
    prefill_hop_ms=7.0,
    decode_hop_ms=0.1,
    embed_ms=dict.fromkeys((1, 2, 4, 8), 0.5),
    layer_ms={
        (shards, batch): (30.0 * batch / shards + 20, (8 + 0.2 * batch) / shards + 1)
        for shards in (1, 2, 4, 8)
        for batch in (1, 2, 4, 8)
    },
)
COSTS = StepCosts(PROFILE, GptShape(48, 51200, 6144, 640))


@pytest.mark.parametrize("shape", [Shape(shards=8, stages=2), Shape(shards=4, stages=3)])
def test_one_request_alone_takes_what_the_published_formula_says(shape: Shape) -> None:
    times = COSTS.times(shape)
    published = PROFILE.latency_ms(StaticConfig(1, shape.stages, shape.shards, 1, 1, 1)) / 1e3
    assert times.through_s[1] + 128 * times.decode_s[1] == pytest.approx(published, rel=1e-9)
    group = PROFILE.prefill_ms(StaticConfig(1, shape.stages, shape.shards, 4, 4, 1)) / 1e3
    assert times.through_s[MOST_GROUP] == pytest.approx(group + 1.1 * 2 * 0.5e-3, rel=1e-9)  # and one embedding
    assert COSTS.least_s(shape) <= published


def test_steps_get_no_shorter_with_more_requests_and_stages_share_them() -> None:
    times = COSTS.times(Shape(shards=8, stages=2))
    assert (np.diff(times.decode_s[1:]) >= 0).all()
    assert times.decode_s[1] == times.decode_s[2]  # one request on each of two stages
    assert times.room <= 16


def test_what_does_not_fit_in_memory_is_no_shape() -> None:
    assert all(COSTS.room(shape) > 0 for shape in COSTS.shapes())
    assert Shape(shards=4, stages=3) in COSTS.shapes()
    small = StepCosts(PROFILE, COSTS.model, memory_bytes=8e9)
    assert small.room(Shape(shards=4, stages=3)) == 0
    assert Shape(shards=4, stages=3) not in small.shapes()


@pytest.mark.parametrize(
    "shape",
    [Shape(shards=8, stages=2), Shape(shards=4, stages=3), Shape(shards=1, stages=12), Shape(shards=4, stages=5)],
)
def test_the_roles_of_a_replica_hold_every_cell_once(shape: Shape) -> None:
    roles = COSTS.roles(shape)
    assert len(roles) == shape.devices // COSTS.gpus
    assert (np.sum(roles, axis=0) == 1).all()
