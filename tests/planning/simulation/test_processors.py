"""Who stands still where more stages compute than there are processors."""

from __future__ import annotations

from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.layout import ParallelConfig
from planning.simulation.batching import BatchLimits, Job
from planning.simulation.lines import Line
from planning.simulation.machine import Agenda, Machine, run
from planning.simulation.processors import Processors
from planning.step_laws import StepLaw

LAW = StepLaw((0.01, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), (1.0, 1.2, 1.8))


def _seconds_per_step(processors: Processors) -> tuple[float, float]:
    """The mean step of three replicas that always compute, and the longest time between two tokens."""
    config, limits = ParallelConfig(1, 1, 1, 8), BatchLimits(8, 64, 4, 10_000)
    agenda, machine = Agenda(), Machine[Line](processors=processors)
    machine.lines = {number: Line(number, config, (), LAW, limits) for number in range(3)}
    times: dict[int, list[float]] = {number: [] for number in machine.lines}
    for number, line in machine.lines.items():
        line.batcher.add(Job(number, 1, 20_000))

    run(agenda, machine, lambda: None, lambda job: times[job.key].append(agenda.now_s), until_s=60.0)
    gaps = [later - one for told in times.values() for one, later in pairwise(told)]
    return sum(gaps) / len(gaps), max(gaps)


def test_some_stand_still_and_on_average_all_are_as_slow_as_the_law_says() -> None:
    mean_s, longest_s = _seconds_per_step(Processors(2))
    assert mean_s == pytest.approx(0.018, rel=0.05)
    assert longest_s > 0.05
    assert _seconds_per_step(Processors(2)) == (mean_s, longest_s), "the same seed, the same luck"
    assert _seconds_per_step(Processors(2, seed=1)) != (mean_s, longest_s)


@pytest.mark.parametrize("processors", [Processors(), Processors(3)])
def test_with_enough_processors_nobody_does(processors: Processors) -> None:
    mean_s, longest_s = _seconds_per_step(processors)
    assert mean_s == pytest.approx(longest_s) == pytest.approx(0.018)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(2, 4), st.integers(0, 9))
def test_stages_of_a_pipeline_never_do(count: int, busy: int, stages: int, seed: int) -> None:
    processors = Processors(count, seed)
    assert processors.slow(0, stages, LAW, busy) == LAW.slow(busy)
    alone = processors.slow(0, 1, LAW, busy)
    assert alone in ({LAW.slow(busy)} if busy <= count else {LAW.slow(count), inf})
