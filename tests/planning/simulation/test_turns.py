"""Whose step is next: the rule is that of the engine, whatever the deadlines and however long others took."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from planning.simulation.turns import Turns
from serving.engine.batch import SampledToken
from serving.engine.scheduler import ScheduledRequest, Scheduler, SchedulerLimits
from serving.engine.sharing import PATIENCE_S, Sharing
from serving.requests import Limits

_LIMITS = SchedulerLimits(2, 64, 4, 200, 10_000)
arrivals = st.lists(
    st.tuples(
        st.integers(0, 2),  # the part
        st.floats(0.0, 2.0),  # when
        st.floats(0.05, 3.0) | st.none(),  # due after
        st.integers(1, 6),  # tokens
    ),
    min_size=1,
    max_size=12,
)


@given(arrivals, st.floats(0.01, 0.3))
@settings(deadline=None, max_examples=200)
def test_every_step_is_of_the_model_whose_turn_it_is_in_the_engine(
    arrivals: list[tuple[int, float, float | None, int]], step_s: float
) -> None:
    schedulers = [Scheduler(_LIMITS, ()) for _ in range(3)]
    sharing, turns = Sharing(schedulers), Turns(3)
    coming, now_s = sorted(enumerate(arrivals), key=lambda one: one[1][1]), 0.0
    while coming or not all(one.idle for one in schedulers):
        while coming and coming[0][1][1] <= now_s:
            key, (part, at_s, due_s, tokens) = coming.pop(0)
            deadline_at = None if due_s is None else at_s + due_s
            limits = Limits(max_tokens=tokens, ignore_eos=True)
            schedulers[part].add(ScheduledRequest(key, [9, 9, 9], limits=limits, deadline_at_s=deadline_at))
        for scheduler in schedulers:
            scheduler.expire(now_s)
        order = turns.order(now_s, [None if one.idle else one.due_s for one in schedulers])
        plan = sharing.schedule(now_s)
        assert (plan is None) == (not order)
        if plan is None:
            now_s = max(now_s, coming[0][1][1]) if coming else now_s
            continue
        assert plan.part == order[0]
        turns.took(order[0], now_s)
        now_s += step_s
        drawn = [SampledToken(one.key, 9, 0.0, []) for one in plan.sequences if one.sampling is not None]
        schedulers[plan.part].complete(plan, drawn)


def test_patience_is_the_engines() -> None:
    turns = Turns(2)
    assert turns.order(0.0, [1.0, 5.0]) == [0, 1]
    turns.took(0, 0.0)
    assert turns.order(PATIENCE_S, [1.0, 5.0]) == [0, 1]
    assert turns.order(PATIENCE_S + 0.001, [1.0, 5.0]) == [1, 0]
