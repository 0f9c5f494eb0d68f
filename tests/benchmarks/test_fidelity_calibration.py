"""What runs of real fleets are simulated with: the drag that steps feel, and laws that are right once steps queue."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest

from benchmarks.fidelity.calibration import calibrated
from benchmarks.fidelity.clients import Stream
from benchmarks.fidelity.drag import elasticity
from benchmarks.fidelity.measure import Measured
from benchmarks.fidelity.scripts import ENGINE, MAX_BATCH, SCRIPTS
from benchmarks.fidelity.steps import FLOW_SPAN_S, drawn, flow_source, typical
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


def _streams() -> list[Stream]:
    source = flow_source(0)
    requests = [drawn(source, SCRIPT.prompts, SCRIPT.outputs) for _ in range(50)]
    return [Stream(prompt, times_s=[0.0] * output) for prompt, output in requests]


@pytest.mark.parametrize("stages", [1, 2])
def test_simulated_flows_are_as_quick_as_measured_ones(stages: int) -> None:
    """Stages that wait for each other are in the measurement; the simulation makes them wait once more. It sends what
    the flow sent, for as long.
    """
    true = StepLaw((0.01, 0.002, 0.0002, 0.0, 0.0, 0.0, 0.0), tuple(1 + 0.3 * more for more in range(2 * stages)))
    degrees, config = (stages, 1), ParallelConfig(1, stages, 1, MAX_BATCH)
    blank = FleetProfile({degrees: true}, {degrees: 500}, CHARGES, ENGINE.step_tokens, ENGINE.block_tokens)

    def simulated_s(law: StepLaw, clients: int, replicas: int) -> float:
        source = flow_source(clients)

        def draw() -> tuple[int, int]:
            return drawn(source, SCRIPT.prompts, SCRIPT.outputs)

        shape = replace(config, replicas=replicas)
        return flow_token_s(law, shape, blank.limits(config), clients, draw, span_s=FLOW_SPAN_S)

    flows = [(clients, replicas) for replicas in (1, 2) for clients in (1, 2, 3, 4, 8)]
    observed = []
    for clients, replicas in flows:
        each = max(1, round(clients / replicas / stages))
        mix = typical(_streams(), each, ENGINE.block_tokens, flow_source(clients))
        busy = min(clients, replicas * stages)
        seconds = simulated_s(true, clients, replicas)
        observed.append(
            Observed(seconds, (mix,), busy, admitted=1 / mean(SCRIPT.outputs), clients=clients, replicas=replicas)
        )
    measured = Measured([(degrees, one) for one in observed])
    found = calibrated(replace(blank, laws=measured.laws()), measured, SCRIPT).laws[degrees]
    for one, (clients, replicas) in zip(observed, flows, strict=True):
        assert simulated_s(found, clients, replicas) == pytest.approx(one.seconds, rel=0.1)


def test_without_flows_laws_stay_as_they_are() -> None:
    law = StepLaw((0.01, 0.002, 0.0002, 0.0, 0.0, 0.0, 0.0), (1.0, 1.3))
    told = FleetProfile({(2, 1): law}, {(2, 1): 500}, CHARGES, ENGINE.step_tokens, ENGINE.block_tokens)
    lone = Observed(9.0, (mix_of([(30, 1), (34, 1)], 4),), busy=2, admitted=1.0)
    assert calibrated(told, Measured([((2, 1), lone)]), SCRIPT).laws[2, 1] == law
