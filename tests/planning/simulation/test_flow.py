"""Clients in a closed loop: where nothing has to wait their tokens come at the pace of steps, else more slowly."""

from __future__ import annotations

import pytest

from data.layout import ParallelConfig
from planning.simulation.batching import BatchLimits
from planning.simulation.flow import flow_token_s
from planning.step_laws import StepLaw

STEP_S = 0.02
ALONE = (1.0,) * 4  # nobody slows anybody down
CONSTANT = StepLaw((STEP_S, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), ALONE)


def pace_s(replicas: int, stages: int, clients: int, law: StepLaw = CONSTANT) -> float:
    limits = BatchLimits(8, 64, 4, 200, stages)
    return flow_token_s(law, ParallelConfig(replicas, stages, 1, 8), limits, clients, lambda: (4, 20))


@pytest.mark.parametrize(("replicas", "stages", "clients"), [(1, 1, 1), (1, 1, 8), (2, 1, 6), (1, 2, 1), (1, 3, 3)])
def test_steps_that_wait_for_nothing_take_what_their_stages_take(replicas: int, stages: int, clients: int) -> None:
    assert pace_s(replicas, stages, clients) == pytest.approx(stages * STEP_S, rel=0.05)


def test_more_clients_than_places_wait_for_each_other() -> None:
    assert pace_s(1, 1, 16) == pytest.approx(2 * STEP_S, rel=0.02)


def test_stages_that_work_at_once_slow_each_other_down() -> None:
    slower = StepLaw(CONSTANT.coefficients, (1.0, 1.5))
    assert pace_s(1, 2, 2, slower) == pytest.approx(1.5 * 2 * STEP_S, rel=0.02)


def test_long_prompts_hold_the_stages_behind_them_up() -> None:
    """What an even share of the work would not say."""
    law = StepLaw((STEP_S, 0.0, STEP_S, 0.0, 0.0, 0.0, 0.0), ALONE)
    limits = BatchLimits(8, 64, 4, 400, 2)
    lengths = iter([(4, 40), (60, 4)] * 10_000)
    config = ParallelConfig(1, 2, 1, 8)
    mixed = flow_token_s(law, config, limits, 2, lambda: next(lengths))
    shares = (2 * (40 * STEP_S + 3 * STEP_S) + 2 * (4 * STEP_S + 59 * STEP_S)) / 44
    assert mixed > 1.1 * shares
