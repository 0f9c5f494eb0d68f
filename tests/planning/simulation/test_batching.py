"""The simulated scheduler schedules what the engine's scheduler schedules, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from planning.simulation.batching import Batcher, BatchLimits, Job, Part, mix
from planning.step_laws import Mix, mix_of
from serving.engine.batch import SampledToken, SequenceStep, StepPlan
from serving.engine.scheduler import ScheduledRequest, Scheduler, SchedulerLimits
from serving.engine.step import StepTensors
from serving.requests import Limits

_BLOCK = 4
_MOST_STEPS = 5000


@dataclass
class Both:
    """The two schedulers, given the same."""

    limits: BatchLimits
    real: Scheduler = field(init=False)
    counted: Batcher = field(init=False)
    under_way: list[tuple[StepPlan, list[Part]]] = field(default_factory=list)
    jobs: dict[int, Job] = field(default_factory=dict)
    requests: dict[int, ScheduledRequest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one = self.limits
        limits = SchedulerLimits(
            one.max_batch, one.step_tokens, one.block_tokens, one.blocks, 10_000, one.plans_in_flight
        )
        self.real, self.counted = Scheduler(limits, ()), Batcher(one)

    def add(self, key: int, prompt: int, most: int) -> None:
        limits = Limits(max_tokens=most, ignore_eos=True)
        self.requests[key] = ScheduledRequest(key, list(range(8, 8 + prompt)), limits=limits)
        self.jobs[key] = Job(key, prompt, most)
        self.real.add(self.requests[key])
        self.counted.add(self.jobs[key])

    def launch(self) -> bool:
        plan, parts = self.real.schedule(0.0), self.counted.schedule()
        wanted = (
            [(one.key, one.start, len(one.tokens), one.sampling is not None) for one in plan.sequences] if plan else []
        )
        assert [(part.job.key, part.start, part.count, part.draws) for part in parts] == wanted
        if plan is not None:
            self.under_way.append((plan, parts))
        return plan is not None

    def collect(self) -> None:
        plan, parts = self.under_way.pop(0)
        drawn = [SampledToken(one.key, 9, 0.0, []) for one in plan.sequences if one.sampling is not None]
        told = self.real.complete(plan, drawn)
        drew = self.counted.complete(parts)
        assert [job.key for job in drew] == [one.key for one in told]
        assert [job.done for job in drew] == [one.finish is not None for one in told]
        assert self.counted.free == round((1 - self.real.kv_usage) * self.limits.blocks)
        assert (len(self.counted.running), len(self.counted.waiting)) == (self.real.running, self.real.waiting)


requests = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=14)
limits = st.builds(
    BatchLimits,
    max_batch=st.integers(1, 6),
    step_tokens=st.integers(1, 24),
    block_tokens=st.just(_BLOCK),
    blocks=st.integers(15, 40),  # the longest request needs 15
    plans_in_flight=st.integers(1, 3),
)


@given(limits, requests, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=150)
def test_every_step_is_the_engines_and_every_request_ends(
    limits: BatchLimits, requests: list[tuple[int, int]], source: object
) -> None:
    both, coming = Both(limits), list(enumerate(requests))
    for _ in range(_MOST_STEPS):
        if coming and (source.random() < 0.3 or not both.under_way):  # type: ignore[attr-defined]
            key, (prompt, most) = coming.pop(0)
            both.add(key, prompt, most)
        launched = len(both.under_way) < limits.plans_in_flight and both.launch()
        if both.under_way and (not launched or source.random() < 0.5):  # type: ignore[attr-defined]
            both.collect()
        if not coming and not both.under_way and not both.counted.jobs:
            break
    assert all(job.done for job in both.jobs.values())
    assert all(len(one.output) == both.jobs[key].output for key, one in both.requests.items())
    assert both.counted.free == limits.blocks


def test_an_adopted_job_goes_on_with_its_cache() -> None:
    batcher = Batcher(BatchLimits(2, 16, _BLOCK, 20))
    job = Job(0, prompt=10, most=5, output=3)
    batcher.adopt(job, cached=13, blocks=4)
    (part,) = batcher.schedule()
    assert (part.start, part.count, part.draws) == (12, 1, True)  # the last known token is computed again
    assert batcher.free == 16


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30)), min_size=1, max_size=8))
@settings(deadline=None)
def test_calls_of_attention_are_the_engines(pieces: list[tuple[int, int]]) -> None:
    plan = StepPlan(
        1,
        [
            SequenceStep(key, start, [9] * count, list(range(-(-(start + count) // _BLOCK))), None, 0)
            for key, (start, count) in enumerate(pieces)
        ],
    )
    groups = StepTensors.of(plan, block_tokens=_BLOCK, window=None, device=torch.device("cpu")).groups
    found = mix_of(pieces, _BLOCK)
    assert found.calls == len(groups)
    assert found.chunks == sum(count > 1 for _, count in pieces)
    cells = sum(group.blocks.shape[0] * group.tokens * group.blocks.shape[1] * _BLOCK for group in groups)
    assert found.read + found.attended == cells


def test_what_a_step_costs_by() -> None:
    first, second = Job(0, 10, 5), Job(1, 30, 5)
    parts = [Part(first, 9, 1, draws=True), Part(second, 0, 20, draws=False)]
    assert mix(parts, _BLOCK) == Mix(2, 21, 2, 12, 20 * 20, 1)


def test_blocks_are_rounded_up() -> None:
    assert [BatchLimits(1, 1, 16, 1).blocks_for(tokens) for tokens in (1, 16, 17)] == [1, 1, 2]
