"""Which model has the next step, decided over real schedulers."""

from __future__ import annotations

from collections import Counter

from serving.engine.batch import SampledToken, StepPlan
from serving.engine.scheduler import ScheduledRequest, Scheduler, SchedulerLimits
from serving.engine.sharing import Sharing
from serving.requests import Limits

STEP_S = 0.01


def sharing(parts: int = 2, patience_s: float = 10.0) -> Sharing:
    limits = SchedulerLimits(max_batch=4, step_tokens=16, block_tokens=4, blocks=40, max_positions=100)
    return Sharing([Scheduler(limits, ()) for _ in range(parts)], patience_s=patience_s)


def ask(shared: Sharing, part: int, key: int, tokens: int, deadline_at_s: float | None = None) -> None:
    limits = Limits(max_tokens=tokens, ignore_eos=True)
    shared.schedulers[part].add(ScheduledRequest(key, [1, 2, 3], limits=limits, deadline_at_s=deadline_at_s))


def complete(shared: Sharing, plan: StepPlan) -> None:
    sampled = [SampledToken(one.key, 5, 0.0, []) for one in plan.sequences if one.sampling is not None]
    shared.schedulers[plan.part].complete(plan, sampled)


def turns(shared: Sharing, steps: int, start_s: float = 0.0) -> list[int]:
    """The parts whose steps follow each other, each completed before the next."""
    found = []
    for step in range(steps):
        plan = shared.schedule(start_s + step * STEP_S)
        if plan is None:
            break
        complete(shared, plan)
        found.append(plan.part)
    return found


def test_without_deadlines_models_take_turns_until_one_has_nothing_left() -> None:
    shared = sharing()
    ask(shared, 0, 1, tokens=8)
    ask(shared, 1, 2, tokens=3)
    assert turns(shared, 20) == [0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0]


def test_the_earliest_deadline_goes_first() -> None:
    shared = sharing(3)
    for part, deadline_at_s in enumerate((None, 5.0, 3.0)):
        ask(shared, part, part, tokens=4, deadline_at_s=deadline_at_s)
    assert turns(shared, 20) == [2] * 4 + [1] * 4 + [0] * 4


def test_who_has_no_deadline_moves_on_all_the_same() -> None:
    shared = sharing(patience_s=4.5 * STEP_S)
    ask(shared, 0, 1, tokens=4)
    ask(shared, 1, 2, tokens=60, deadline_at_s=50.0)
    gaps = "".join(map(str, turns(shared, 30))).split("0")
    assert [len(gap) for gap in gaps[:4]] == [5, 4, 4, 4]


def test_who_cannot_compute_now_leaves_the_step_to_the_next() -> None:
    shared = sharing()
    ask(shared, 0, 1, tokens=4, deadline_at_s=1.0)
    ask(shared, 1, 2, tokens=4)
    first, second = shared.schedule(0.0), shared.schedule(0.0)
    assert first is not None
    assert second is not None
    assert Counter((first.part, second.part)) == {0: 1, 1: 1}, "one model's only request is in a step already"
    assert shared.schedule(0.0) is None


def test_a_model_alone_is_scheduled_as_if_it_were_not_shared() -> None:
    alone, shared = sharing(1), sharing(2)
    for one in (alone, shared):
        ask(one, 0, 1, tokens=5)
        ask(one, 0, 2, tokens=7)
    for now_s in range(12):
        plans = alone.schedule(now_s), shared.schedule(now_s)
        assert plans[0] == plans[1]
        for one, plan in zip((alone, shared), plans, strict=True):
            if plan is not None:
                complete(one, plan)
