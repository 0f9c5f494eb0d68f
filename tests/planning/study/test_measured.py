"""A profile of one's own in the form that the simulations take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data.catalog import instance_type
from data.errors import InvalidInput
from data.layout import ParallelConfig
from data.placement import Shape
from planning.costs import CostModel
from planning.simulation.serving_steps import Service
from planning.study.measured import Demand, as_static_profile, measured_model
from tests.planning.test_costs import SPEC, profile

COSTS = CostModel.fit(profile())
DEMAND = Demand(rate_rps=5.0, cv=1.0, input_tokens=96, output_tokens=40)
CPU = instance_type("local-cpu")


@pytest.mark.parametrize("shape", [Shape(shards=1, stages=1), Shape(shards=2, stages=1), Shape(shards=2, stages=2)])
def test_a_lone_request_takes_as_long_as_the_cost_model_says(shape: Shape) -> None:
    model = measured_model(COSTS, CPU, DEMAND, 4)
    service = Service(np.array([0.0]), 1)
    service.start(0, 0.0, model.costs.times(shape))
    service.advance(1000.0)
    config = ParallelConfig(1, shape.stages, shape.shards, 1)
    said = COSTS.request_latency_s(config, 1, DEMAND.input_tokens, DEMAND.output_tokens)
    # 128 simulated steps stand for 39 real ones after the prefill's token.
    assert service.line.done_s[0] == pytest.approx(said, rel=0.04)


def test_bytes_are_the_models_own() -> None:
    costs = measured_model(COSTS, CPU, DEMAND, 4).costs
    held = costs.cell_bytes * 16 * SPEC.layers + costs.embedding_bytes
    assert held == pytest.approx(SPEC.weight_bytes)
    assert costs.kv_bytes == 2 * 4 * SPEC.layers * SPEC.kv_heads * SPEC.head_dim * (96 + 40)


def test_measured_degrees_alone_are_used() -> None:
    table = as_static_profile(COSTS, DEMAND)
    assert {shards for shards, _ in table.layer_ms} == {1, 2, 4}
    assert table.most_shards == 4


def test_a_model_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(InvalidInput, match="does not fit on 4"):
        measured_model(COSTS, replace(CPU, memory_bytes=100_000), DEMAND, 4)
