"""What runs of real fleets are simulated with: the drag that steps feel, and laws that are right once steps queue."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.fidelity.calibration import calibrated
from benchmarks.fidelity.drag import elasticity
from benchmarks.fidelity.measure import Measured
from benchmarks.fidelity.scripts import ENGINE, MAX_BATCH, SCRIPTS
from benchmarks.fidelity.steps import FLOW_SPAN_S, drawn, flow_source
from data.layout import ParallelConfig
from planning.simulation.fleet_profile import FleetProfile
from planning.simulation.flow import flow_token_s
from planning.step_laws import Observed, StepLaw, mix_of
from tests.planning.simulation.test_fleet import CHARGES

SCRIPT = SCRIPTS[0]


def _twice(first_s: float, second_s: float, drags: tuple[float, float]) -> tuple[Observed, Observed]:
    mix = mix_of([(20, 1)], 4)
    first, second = (Observed(seconds, (mix,), 1) for seconds in (first_s, second_s))
    return replace(first, drag=drags[0]), replace(second, drag=drags[1])


def test_steps_feel_as_much_of_the_drag_as_the_same_steps_show() -> None:
    assert elasticity([_twice(1.0, 2.0, (1.0, 2.0)), _twice(3.0, 1.5, (1.4, 0.7))]) == pytest.approx(1.0)
    assert elasticity([_twice(1.0, 2.0**0.5, (1.0, 2.0)), _twice(1.0, 1.0, (1.0, 1.0))]) == pytest.approx(0.5)
    assert elasticity([_twice(1.0, 0.5, (1.0, 2.0))]) == 0.0
    assert elasticity([_twice(1.0, 2.0, (1.0, 1.0))]) == 1.0, "nothing says otherwise"


def test_laws_are_scaled_until_simulated_flows_are_as_quick_as_measured_ones() -> None:
    """Stages that wait for each other are in the measurement; the simulation makes them wait once more. It sends what
    the flow sent, for as long.
    """
    mix = mix_of([(30, 1), (34, 1)], 4)
    law = StepLaw((0.01, 0.002, 0.0002, 0.0, 0.0, 0.0, 0.0), (1.0, 1.3))
    told = FleetProfile({(2, 1): law}, {(2, 1): 500}, CHARGES, ENGINE.step_tokens, ENGINE.block_tokens)
    source = flow_source(4)
    config = ParallelConfig(1, 2, 1, MAX_BATCH)

    def draw() -> tuple[int, int]:
        return drawn(source, SCRIPT.prompts, SCRIPT.outputs)

    simulated_s = flow_token_s(law, config, told.limits(config), 4, draw, span_s=FLOW_SPAN_S)
    flow = Observed(0.8 * simulated_s, (mix,), busy=2, admitted=0.05)
    lone = Observed(9.0, (mix,), busy=2, admitted=1.0)
    measured = Measured([((2, 1), flow), ((2, 1), lone)])
    scaled = calibrated(told, measured, SCRIPT).laws[2, 1]
    assert scaled.work_s(mix) == pytest.approx(0.8 * law.work_s(mix))
    assert calibrated(told, Measured([((2, 1), lone)]), SCRIPT).laws[2, 1] == law
