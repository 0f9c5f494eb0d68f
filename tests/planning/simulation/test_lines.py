"""Lines of stages on shared processors, by hand."""

from __future__ import annotations

import pytest

from data.layout import Device, ParallelConfig
from planning.simulation.batching import BatchLimits, Job
from planning.simulation.lines import Line
from planning.simulation.machine import Machine
from planning.step_laws import StepLaw

STEP_S, TOKEN_S = 0.1, 0.01
LAW = StepLaw((STEP_S, TOKEN_S, TOKEN_S, 0.0, 0.0, 0.0, 0.0), (1.0, 1.5, 2.0))
DECODE_S = STEP_S + TOKEN_S


def _line(stages: int = 1, *, number: int = 1, step_tokens: int = 100) -> Line:
    config = ParallelConfig(1, stages, 1, 4)
    devices = tuple(Device("i0", index) for index in range(stages))
    return Line(number, config, devices, LAW, BatchLimits(4, step_tokens, 16, 100, stages))


def _run(machine: Machine, seconds: float = float("inf")) -> tuple[float, dict[int, list[float]]]:
    """Until nothing is left to do, or for so long: the end, and when each job had its tokens."""
    now, tokens = 0.0, dict[int, list[float]]()
    while True:
        for job in machine.lead():
            tokens.setdefault(job.key, []).append(now)
        step_s = min(machine.next_s(), seconds - now)
        if step_s in (0.0, float("inf")) or now >= seconds:
            return now, tokens
        machine.work(step_s)
        now += step_s


def test_a_request_takes_its_prefill_and_a_step_for_every_other_token() -> None:
    line = _line()
    line.batcher.add(Job(0, prompt=20, most=5))
    end_s, tokens = _run(Machine({1: line}))
    assert tokens[0][0] == pytest.approx(STEP_S + 20 * TOKEN_S)
    assert end_s == pytest.approx(STEP_S + 20 * TOKEN_S + 4 * DECODE_S)
    assert line.drained
    assert not line.batcher.jobs


def test_a_long_prompt_takes_several_steps() -> None:
    line = _line(step_tokens=8)
    line.batcher.add(Job(0, prompt=20, most=1))
    end_s, _ = _run(Machine({1: line}))
    assert end_s == pytest.approx(3 * STEP_S + 20 * TOKEN_S)


def test_every_stage_takes_its_time_and_two_steps_are_under_way_at_once() -> None:
    alone = _line(stages=2)
    alone.batcher.add(Job(0, prompt=1, most=4))
    end_s, _ = _run(Machine({1: alone}))
    assert end_s == pytest.approx(4 * 2 * DECODE_S)
    pair = _line(stages=2)
    for key in range(2):
        pair.batcher.add(Job(key, prompt=1, most=4))
    end_s, tokens = _run(Machine({1: pair}))
    # While both stages compute, either is 1.5 times as slow; only the first and the last stage work alone.
    assert end_s == pytest.approx(DECODE_S * (2 + 7 * 1.5))
    assert len(tokens[0]) == len(tokens[1]) == 4


def test_replicas_slow_each_other_down_while_both_compute() -> None:
    first, second = _line(number=1), _line(number=2)
    first.batcher.add(Job(0, prompt=1, most=2))
    second.batcher.add(Job(1, prompt=1, most=4))
    end_s, tokens = _run(Machine({1: first, 2: second}))
    assert tokens[0][-1] == pytest.approx(2 * 1.5 * DECODE_S)
    assert end_s == pytest.approx(2 * 1.5 * DECODE_S + 2 * DECODE_S)


def test_what_goes_on_beside_slows_everybody() -> None:
    line = _line()
    line.batcher.add(Job(0, prompt=1, most=3))
    end_s, _ = _run(Machine({1: line}, slowdowns=[1.2, 2.0]))
    assert end_s == pytest.approx(3 * 2.0 * DECODE_S)


def test_a_halted_replica_does_nothing_and_its_jobs_keep_what_was_finished() -> None:
    line = _line()
    line.batcher.add(Job(0, prompt=4, most=9))
    machine = Machine({1: line})
    _run(machine, STEP_S + 4 * TOKEN_S + 2.5 * DECODE_S)
    line.halted = True
    assert machine.next_s() == float("inf")
    (job,) = line.break_up()
    assert (job.output, job.cached, job.in_flight) == (3, 6, False)


def test_a_paused_replica_finishes_its_step_and_launches_no_other() -> None:
    line = _line()
    line.batcher.add(Job(0, prompt=1, most=9))
    machine = Machine({1: line})
    _run(machine, 0.5 * DECODE_S)
    line.serving = False
    assert line.room == 0
    assert not line.drained
    _run(machine)
    assert line.drained
    assert [job.output for job in line.batcher.jobs] == [1]
