"""The scheduler against a toy model: whatever happens, every request gets the tokens of an undisturbed run."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InvalidInput
from serving.engine.batch import SampledToken, StepPlan
from serving.engine.scheduler import Emission, ScheduledRequest, Scheduler, SchedulerLimits
from serving.requests import Limits, Sampling

EOS = 0
VOCAB = 23


def next_token(tokens: list[int]) -> int:
    """Depends on every token before it, in order."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 10_007
    return value % VOCAB


def undisturbed(prompt: list[int], limits: Limits, max_positions: int) -> tuple[list[int], str]:
    output: list[int] = []
    while True:
        output.append(next_token(prompt + output))
        if output[-1] in limits.stop_token_ids or (output[-1] == EOS and not limits.ignore_eos):
            return output, "stop"
        if len(output) == limits.max_tokens or len(prompt) + len(output) >= max_positions:
            return output, "length"


@dataclass
class ToyEngine:
    """Executes plans on paged memory of single tokens, and checks that they make sense."""

    limits: SchedulerLimits
    memory: dict[int, tuple[int, int]] = field(default_factory=dict)

    def run(self, plan: StepPlan) -> list[SampledToken]:
        assert sum(len(step.tokens) for step in plan.sequences) <= self.limits.step_tokens
        assert len(plan.sequences) <= self.limits.max_batch
        size, sampled = self.limits.block_tokens, []
        for step in plan.sequences:
            for position, token in enumerate(step.tokens, start=step.start):
                self.memory[step.blocks[position // size] * size + position % size] = (step.key, token)
            known = [
                self.memory[step.blocks[at // size] * size + at % size] for at in range(step.start + len(step.tokens))
            ]
            assert {key for key, _ in known} == {step.key}, "a sequence reads another's KV"
            if step.sampling is not None:
                sampled.append(SampledToken(step.key, next_token([token for _, token in known]), -1.0, []))
        return sampled


def drain(scheduler: Scheduler, engine: ToyEngine, depth: int = 1) -> list[Emission]:
    emissions, flying = [], []
    for _ in range(5000):
        while len(flying) < depth and (plan := scheduler.schedule(0.0)):
            flying.append((plan, engine.run(plan)))
        emissions += scheduler.expire(0.0)
        if not flying:
            assert scheduler.idle, "requests are stuck"
            return emissions
        emissions += scheduler.complete(*flying.pop(0))
    raise AssertionError("the scheduler does not come to an end")


def collect(emissions: list[Emission]) -> dict[int, tuple[list[int], str]]:
    """Tokens and end of every request; indices have to be consecutive."""
    result: dict[int, tuple[list[int], str]] = {}
    for emission in emissions:
        tokens, finish = result.get(emission.key, ([], ""))
        assert not finish, "something came after the end"
        assert emission.index == len(tokens)
        tokens = tokens + ([] if emission.token is None else [emission.token])
        result[emission.key] = (tokens, emission.finish or "")
    return result


requests = st.lists(
    st.tuples(
        st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=12),
        st.builds(
            Limits,
            max_tokens=st.integers(1, 14),
            ignore_eos=st.booleans(),
            stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=2).map(tuple),
        ),
    ),
    min_size=1,
    max_size=10,
)


@given(
    requests=requests,
    depth=st.integers(1, 3),
    max_batch=st.integers(1, 6),
    step_tokens=st.integers(1, 12),
    block_tokens=st.integers(1, 4),
    spare=st.integers(0, 8),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_every_request_gets_its_own_tokens(
    requests: list[tuple[list[int], Limits]],
    depth: int,
    max_batch: int,
    step_tokens: int,
    block_tokens: int,
    spare: int,
    data: st.DataObject,
) -> None:
    """Random arrivals and aborts, tiny KV (the largest request just fits), several steps under way."""
    blocks = -(-24 // block_tokens) + spare
    limits = SchedulerLimits(max_batch, step_tokens, block_tokens, blocks, 24, plans_in_flight=depth)
    scheduler, engine = Scheduler(limits, [EOS]), ToyEngine(limits)
    aborted, emissions, flying = set(), [], []
    for key, (prompt, request_limits) in enumerate(requests):
        scheduler.add(ScheduledRequest(key, prompt, limits=request_limits))
        for _ in range(data.draw(st.integers(0, 6))):
            if len(flying) < depth and (plan := scheduler.schedule(0.0)):
                flying.append((plan, engine.run(plan)))
            elif flying:
                emissions += scheduler.complete(*flying.pop(0))
        if data.draw(st.integers(0, 4)) == 0:
            victim = data.draw(st.integers(0, key))
            if scheduler.abort(victim):
                aborted.add(victim)
    while flying:
        emissions += scheduler.complete(*flying.pop(0))
    emissions += drain(scheduler, engine, depth)
    assert scheduler.kv_usage == 0.0
    results = collect(emissions)
    for key, (prompt, request_limits) in enumerate(requests):
        expected = undisturbed(prompt, request_limits, 24)
        if key in aborted:
            tokens = results.get(key, ([], ""))[0]
            assert tokens == expected[0][: len(tokens)]
        else:
            assert results[key] == expected


@given(requests, st.integers(0, 13), st.integers(1, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_replica_takes_over_where_another_stopped(
    requests: list[tuple[list[int], Limits]], committed: int, step_tokens: int, move: bool
) -> None:
    """By replay of the committed tokens, or by adoption of the KV of some of them."""
    limits = SchedulerLimits(4, step_tokens, 3, 200, 24)
    scheduler, engine = Scheduler(limits, [EOS]), ToyEngine(limits)
    for key, (prompt, request_limits) in enumerate(requests):
        known = undisturbed(prompt, request_limits, 24)[0][:committed]
        request = ScheduledRequest(key, prompt, list(known), limits=request_limits)
        if move:
            cached = (prompt + known)[: 2 + key]
            blocks = scheduler.reserve(len(cached))
            assert blocks is not None
            for position, token in enumerate(cached):
                engine.memory[blocks[position // 3] * 3 + position % 3] = (key, token)
            scheduler.adopt(request, len(cached), blocks)
        else:
            scheduler.add(request)
    ends: dict[int, Emission] = {}
    tokens: dict[int, list[int]] = {}
    for emission in drain(scheduler, engine):
        if emission.token is not None:
            tokens.setdefault(emission.key, []).append(emission.token)
        ends[emission.key] = emission
    assert scheduler.kv_usage == 0.0
    for key, (prompt, request_limits) in enumerate(requests):
        expected, finish = undisturbed(prompt, request_limits, 24)
        assert expected[:committed] + tokens.get(key, []) == expected
        assert ends[key].finish == finish


def scheduler_of(**changes: int) -> Scheduler:
    fields = {"max_batch": 4, "step_tokens": 8, "block_tokens": 2, "blocks": 16, "max_positions": 32} | changes
    return Scheduler(SchedulerLimits(**fields), [EOS])


def test_prefill_is_chunked_and_leaves_room_for_decoding() -> None:
    scheduler = scheduler_of()
    scheduler.add(ScheduledRequest(1, [5], limits=Limits(ignore_eos=True)))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    scheduler.complete(plan, [SampledToken(1, 3, 0.0, [])])
    scheduler.add(ScheduledRequest(2, [4] * 12))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert [(step.key, len(step.tokens)) for step in plan.sequences] == [(1, 1), (2, 7)]
    assert plan.sequences[1].sampling is None


def test_a_step_never_exceeds_its_tokens() -> None:
    scheduler = scheduler_of(step_tokens=2)
    for key, prompt in enumerate(([1], [1, 2, 3], [4, 5])):
        scheduler.add(ScheduledRequest(key, prompt))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert [(step.key, step.tokens) for step in plan.sequences] == [(0, [1]), (1, [1])]


def test_steps_under_way_share_the_running_requests() -> None:
    scheduler = scheduler_of(plans_in_flight=2)
    for key in range(4):
        scheduler.add(ScheduledRequest(key, [key + 1]))
    first, second, third = (scheduler.schedule(0.0) for _ in range(3))
    assert first is not None
    assert second is not None
    assert [step.key for step in first.sequences] == [0, 1]
    assert [step.key for step in second.sequences] == [2, 3]
    assert third is None


def test_the_youngest_gives_way_and_is_counted() -> None:
    scheduler = scheduler_of(blocks=4)
    engine = ToyEngine(SchedulerLimits(4, 8, 2, 4, 32))
    for key in range(2):
        scheduler.add(ScheduledRequest(key, [key + 1, 2, 3], limits=Limits(max_tokens=5, ignore_eos=True)))
    results = collect(drain(scheduler, engine))
    given_up = scheduler.given_up()
    assert set(given_up) == {1}
    assert scheduler.given_up() == [], "told once"
    assert results[1][0] == undisturbed([2, 2, 3], Limits(max_tokens=5, ignore_eos=True), 32)[0]


def test_a_request_that_can_never_fit_ends_with_a_sentence() -> None:
    scheduler = scheduler_of(blocks=3)
    scheduler.add(ScheduledRequest(1, [1] * 7))
    scheduler.add(ScheduledRequest(2, [1] * 3, limits=Limits(max_tokens=20, ignore_eos=True)))
    emissions = drain(scheduler, ToyEngine(SchedulerLimits(4, 8, 2, 3, 32)))
    ends = {emission.key: emission for emission in emissions if emission.finish}
    assert ends[1].finish == ends[2].finish == "abort"
    assert "do not fit" in ends[1].error
    assert sum(emission.token is not None for emission in emissions) == 4


def test_deadlines_end_waiting_and_running_requests() -> None:
    scheduler = scheduler_of(max_batch=1)
    for key in (1, 2):
        scheduler.add(ScheduledRequest(key, [1, 2], deadline_at_s=10.0))
    plan = scheduler.schedule(9.0)
    assert plan is not None
    assert scheduler.expire(9.0) == []
    assert {(end.key, end.finish, end.token) for end in scheduler.expire(10.0)} == {
        (1, "deadline", None),
        (2, "deadline", None),
    }
    assert scheduler.schedule(10.0) is None
    assert scheduler.complete(plan, [SampledToken(1, 3, 0.0, [])]) == []
    assert scheduler.idle
    assert scheduler.kv_usage == 0.0


def test_aborting_in_flight_frees_at_completion() -> None:
    scheduler = scheduler_of()
    scheduler.add(ScheduledRequest(1, [1, 2, 3]))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert scheduler.abort(1)
    assert not scheduler.abort(1)
    assert scheduler.kv_usage > 0
    assert scheduler.snapshot() == []
    assert scheduler.complete(plan, [SampledToken(1, 3, 0.0, [])]) == []
    assert scheduler.kv_usage == 0.0


def test_snapshot_tells_what_is_cached() -> None:
    scheduler = scheduler_of(step_tokens=4)
    scheduler.add(ScheduledRequest(1, [1] * 7))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert scheduler.snapshot() == []
    scheduler.complete(plan, [])
    assert scheduler.snapshot() == [(1, 4, plan.sequences[0].blocks, 0)]


def test_wrong_requests_are_refused() -> None:
    scheduler = scheduler_of()
    scheduler.add(ScheduledRequest(1, [1]))
    with pytest.raises(InvalidInput, match="already"):
        scheduler.add(ScheduledRequest(1, [1]))
    with pytest.raises(InvalidInput, match="empty prompt"):
        scheduler.add(ScheduledRequest(2, []))
    blocks = scheduler.reserve(3)
    assert blocks is not None
    with pytest.raises(InvalidInput, match="do not fit"):
        scheduler.adopt(ScheduledRequest(3, [1] * 9), 8, blocks)
    assert scheduler.reserve(1000) is None
    scheduler.release(blocks)
    assert scheduler.kv_usage == 0.0


def test_running_requests_keep_a_spare_block_each() -> None:
    scheduler = scheduler_of(blocks=8, block_tokens=4, max_batch=4)
    for key in (1, 2):
        scheduler.add(ScheduledRequest(key, [1] * 4))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert scheduler.reserve(17) is None, "six are free, two of them spare"
    blocks = scheduler.reserve(16)
    assert blocks is not None
    assert scheduler.reserve(17, held=4) is None
    assert scheduler.reserve(16, held=4) == []
    scheduler.release(blocks)


def test_the_next_plan_says_whose_kv_is_void_unless_it_has_come_meanwhile() -> None:
    scheduler = scheduler_of()
    scheduler.forget([7, 8])
    blocks = scheduler.reserve(3)
    assert blocks is not None
    scheduler.adopt(ScheduledRequest(8, [1] * 3), 2, blocks)
    scheduler.add(ScheduledRequest(9, [1] * 3))
    scheduler.forget([8, 9])  # a late word of an earlier attempt: what there is of the second is not its own
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert plan.ended == [7, 9]


def test_sampling_is_wanted_for_the_last_token_only() -> None:
    scheduler = scheduler_of(step_tokens=2)
    sampling = Sampling(temperature=0.5, seed=3)
    scheduler.add(ScheduledRequest(1, [1, 2, 3], [4], sampling))
    plans = []
    while plan := scheduler.schedule(0.0):
        plans.append(plan.sequences[0])
        if plan.sequences[0].sampling is not None:
            break
        scheduler.complete(plan, [])
    assert [step.sampling for step in plans] == [None, sampling]
    assert [step.tokens for step in plans] == [[1, 2], [3, 4]]
    assert plans[-1].output_index == 1
