"""Several models on a fleet: turns, deadlines and admission, by hand."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.deployment import Hosted, SharedGroup
from planning.load import Pace
from planning.simulation.shared_fleet import Ask, SharedProfile, simulate_shared
from planning.step_laws import StepLaw

STEP_S, TOKEN_S, OVERHEAD_S = 0.1, 0.01, 0.02
LAW = StepLaw((STEP_S, 0.0, TOKEN_S, 0.0, 0.0, 0.0, 0.0), (1.0,) * 4, OVERHEAD_S)
SHAPES = [("a", 1, 1), ("b", 1, 1)]
PACE = Pace(TOKEN_S, STEP_S, 2)
OPEN = SharedProfile(dict.fromkeys(SHAPES, LAW), dict.fromkeys(SHAPES, 100), {}, 64, 4)
STRICT = replace(OPEN, paces=dict.fromkeys(SHAPES, PACE))


def _group(*models: str) -> SharedGroup:
    return SharedGroup(1, 1, tuple(Hosted(model, 2, 1 / len(models)) for model in models))


def test_a_model_alone_takes_a_step_for_every_token() -> None:
    (done_s,) = simulate_shared([_group("a")], OPEN, [Ask(1.0, "a", 1, 5)])
    assert done_s == pytest.approx(1.0 + OVERHEAD_S + 5 * STEP_S)


def test_slow_processors_are_slow_for_all_models() -> None:
    asks = [Ask(0.0, "a", 1, 5), Ask(0.0, "b", 1, 5)]
    usual, slow = (simulate_shared([_group("a", "b")], OPEN, asks, drag=drag) for drag in ((), [(0.0, 1.5)]))
    assert slow - OVERHEAD_S == pytest.approx(1.5 * (usual - OVERHEAD_S))


def test_models_of_a_group_take_turns() -> None:
    first, second = simulate_shared([_group("a", "b")], OPEN, [Ask(0.0, "a", 1, 5), Ask(0.0, "b", 1, 5)])
    assert (first, second) == (pytest.approx(OVERHEAD_S + 9 * STEP_S), pytest.approx(OVERHEAD_S + 10 * STEP_S))


def test_the_earlier_deadline_goes_first_until_the_other_has_waited_long_enough() -> None:
    asks = [Ask(0.0, "a", 1, 4, 9.0), Ask(0.0, "b", 1, 2, 1.0)]
    first, second = simulate_shared([_group("a", "b")], OPEN, asks)
    assert second == pytest.approx(OVERHEAD_S + 2 * STEP_S)
    assert first == pytest.approx(OVERHEAD_S + 6 * STEP_S)


def test_a_request_goes_where_there_is_less_to_do_and_only_where_its_model_is() -> None:
    groups = [_group("a"), _group("a", "b")]
    asks = [Ask(0.0, "b", 1, 10), Ask(0.01, "a", 1, 10), Ask(0.02, "b", 1, 10)]
    done_s = simulate_shared(groups, OPEN, asks)
    assert done_s[1] == pytest.approx(0.01 + OVERHEAD_S + 10 * STEP_S)
    assert done_s[2] > done_s[0]


def test_who_is_late_is_not_answered_and_frees_the_place() -> None:
    asks = [Ask(0.0, "a", 1, 30, 1.0), Ask(0.0, "a", 1, 3), Ask(0.0, "a", 1, 3), Ask(0.0, "a", 1, 30, 0.3)]
    done_s = simulate_shared([_group("a")], OPEN, asks)
    assert [done == inf for done in done_s] == [True, False, False, True]


def test_who_cannot_be_answered_in_time_is_refused_and_holds_nobody_up() -> None:
    asks = [Ask(0.0, "a", 1, 10, 2.0), Ask(0.0, "a", 1, 10, 2.0), Ask(0.0, "a", 1, 10, 1.5), Ask(0.0, "a", 1, 10, 3.0)]
    done_s = simulate_shared([_group("a")], STRICT, asks)
    assert [done == inf for done in done_s] == [False, False, True, False]
    with_it = simulate_shared([_group("a")], OPEN, asks)
    assert done_s[3] <= with_it[3]


@given(
    st.lists(
        st.tuples(st.floats(0, 3), st.sampled_from("ab"), st.integers(1, 40), st.integers(1, 12), st.floats(0.2, 8)),
        min_size=1,
        max_size=15,
    )
)
@settings(deadline=None, max_examples=60)
def test_nobody_is_answered_after_the_deadline_and_with_time_everybody_is(
    told: list[tuple[float, str, int, int, float]],
) -> None:
    groups = [_group("a", "b"), _group("b")]
    asks = [Ask(*one) for one in sorted(told)]
    for ask, done_s in zip(asks, simulate_shared(groups, STRICT, asks), strict=True):
        assert done_s == inf or done_s <= ask.arrival_s + OVERHEAD_S + ask.deadline_s + STEP_S + 41 * TOKEN_S
    patient = [replace(ask, deadline_s=inf) for ask in asks]
    assert all(done_s < inf for done_s in simulate_shared(groups, OPEN, patient))
