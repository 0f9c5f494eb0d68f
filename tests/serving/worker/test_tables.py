"""Plans reach the other ranks as they are, without saying what these know."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.engine.batch import SampledToken, SequenceStep, StepPlan
from serving.engine.scheduler import ScheduledRequest, Scheduler, SchedulerLimits
from serving.requests import Limits
from serving.worker.tables import Known, Sent

BLOCKS = 6


def step(number: int, tables: dict[int, list[int]], *, ended: tuple[int, ...] = (), part: int = 0) -> StepPlan:
    sequences = [SequenceStep(key, 4, [7], blocks, None, 2) for key, blocks in tables.items()]
    return StepPlan(number, sequences, list(ended), part)


@given(st.data())
def test_whatever_a_scheduler_plans_arrives(data: st.DataObject) -> None:
    """With so few blocks requests give theirs up to others all the time, and some are aborted or come again."""
    scheduler = Scheduler(SchedulerLimits(3, 5, 2, BLOCKS, 40), [])
    sent, known = Sent(), Known()
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["add", "abort", "adopt", "step", "step", "step"]))
        key = data.draw(st.integers(0, 4))
        request = ScheduledRequest(key, [1] * data.draw(st.integers(1, 6)), limits=Limits(max_tokens=5))
        if what == "abort":
            scheduler.abort(key)
        elif what != "step" and key not in scheduler._sequences:
            tokens = request.total_tokens
            blocks = scheduler.reserve(tokens) if what == "adopt" else None
            if blocks is None:
                scheduler.add(request)
            else:
                scheduler.adopt(request, tokens, blocks)
                sent.forget(0, key)
        elif (plan := scheduler.schedule(0.0)) is not None:
            assert known.decode(sent.encode(plan)) == plan
            drawn = [SampledToken(one.key, 1, 0.0, []) for one in plan.sequences if one.sampling is not None]
            scheduler.complete(plan, drawn)
            scheduler.expire(0.0)


def test_what_is_known_is_not_said_again() -> None:
    sent, known = Sent(), Known()
    table = list(range(1000))
    whole = sent.encode(step(1, {5: table}))
    first = known.decode(whole)
    rest = sent.encode(step(2, {5: table}))
    assert len(rest) < 50 < len(whole) / 10
    assert known.decode(rest).sequences[0].blocks is first.sequences[0].blocks
    grown = step(3, {5: [*table, 4, 2]})
    assert len(message := sent.encode(grown)) < 50
    assert known.decode(message) == grown


def test_parts_and_lives_are_kept_apart() -> None:
    sent, known = Sent(), Known()
    plans = [
        step(1, {5: [1, 2, 3]}),
        step(2, {5: [9]}, part=1),
        step(3, {5: [4, 5]}, ended=(5,)),
        step(4, {5: [9, 8]}, part=1),
        step(5, {5: [4, 5, 6]}),
    ]
    for plan in plans:
        assert known.decode(sent.encode(plan)) == plan
    sent.forget(0, 5)
    other = step(6, {5: [7]})
    assert known.decode(sent.encode(other)) == other
