"""Laws of steps: found again from what they say, and what contention does."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InvalidInput
from planning.step_laws import Mix, Observed, StepLaw, fit_law, mean_mix, mix_of, prompt_steps

LAW = StepLaw((0.02, 0.001, 0.0015, 0.0012, 1e-5, 2e-6, 0.004), (1.0, 1.3, 1.9, 2.5), 0.006)
BLOCK = 16


def decode(count: int, *contexts: int) -> Mix:
    """Single tokens: `count` after each of the contexts."""
    return mix_of([(context, 1) for context in contexts] * count, BLOCK)


_JOINING = (
    ([(40, 1)], [(0, 8)]),
    ([(40, 1), (90, 1)], [(0, 30)]),
    ([(40, 1)], [(0, 12), (0, 50)]),
    ([(20, 1), (40, 1), (60, 1)], [(0, 8), (0, 40), (0, 150)]),
)


def _observed(law: StepLaw, stages: int) -> list[Observed]:
    decoding = [
        Observed(stages * law.work_s(mix) * law.slow(busy), (mix,), busy)
        for busy, mix in [(1, decode(1, 40)), (2, decode(1, 40)), (3, decode(1, 40)), (4, decode(1, 40))]
        + [(4, decode(count, context)) for count in (2, 4, 8) for context in (40, 300)]
        + [(4, decode(1, *contexts)) for contexts in ((8, 40, 100), (20, 200), (8, 20, 40, 100, 300))]
        + [(4, mix_of([*singles, *chunks], BLOCK)) for singles, chunks in _JOINING]
    ]
    prompts = [
        Observed(stages * sum(map(law.work_s, steps)) * law.slow(1) + law.overhead_s, steps, 1, admitted=1.0)
        for steps in (prompt_steps(tokens, 256, BLOCK) for tokens in (8, 64, 200, 600))
    ]
    return decoding + prompts


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_law_is_found_again_from_what_it_says(stages: int) -> None:
    found = fit_law(_observed(LAW, stages), stages)
    assert found.coefficients == pytest.approx(LAW.coefficients, rel=0.02, abs=1e-7)
    assert found.slowness == pytest.approx(LAW.slowness, rel=0.02)
    assert found.overhead_s == pytest.approx(LAW.overhead_s, rel=0.1)
    for one in _observed(LAW, stages):
        assert LAW.predicted_s(one, stages) == pytest.approx(one.seconds)
        assert found.predicted_s(one, stages) == pytest.approx(one.seconds, rel=0.01)


def test_one_wild_observation_does_not_bend_the_law() -> None:
    wild = Observed(1.0, (decode(2, 40),), 4)
    found = fit_law([*_observed(LAW, 1), wild], 1)
    assert found.work_s(decode(4, 100)) == pytest.approx(LAW.work_s(decode(4, 100)), rel=0.05)


def test_noise_does_not_make_a_law_too_quick() -> None:
    """Weighed by what was observed, quick observations would count for more than slow ones."""
    noisy = [replace(one, seconds=one.seconds * factor) for one in _observed(LAW, 1) for factor in (0.75, 1.25)]
    found = fit_law(noisy, 1)
    for one in _observed(LAW, 1):
        assert found.predicted_s(one, 1) == pytest.approx(one.seconds, rel=0.02)


def test_what_was_observed_while_processors_were_slow_says_the_same() -> None:
    dragged = [
        replace(one, seconds=one.seconds * drag, drag=drag)
        for one, drag in zip(_observed(LAW, 1), cycle((0.8, 1.0, 1.5)), strict=False)
    ]
    found = fit_law(dragged, 1)
    for one in dragged:
        assert found.predicted_s(one, 1) == pytest.approx(one.seconds, rel=0.01)


def test_a_law_needs_observations() -> None:
    with pytest.raises(InvalidInput, match="measure the fleet first"):
        fit_law([], 1)


def test_beyond_what_was_measured_processors_are_shared() -> None:
    assert LAW.slow(8) == pytest.approx(2 * LAW.slow(4))
    assert LAW.slow(0) == LAW.slow(1) == 1.0


@given(st.integers(1, 2000), st.integers(1, 300))
@settings(deadline=None)
def test_the_steps_of_a_prompt_hold_all_its_tokens(tokens: int, most: int) -> None:
    steps = prompt_steps(tokens, most, BLOCK)
    assert sum(step.tokens for step in steps) == tokens
    assert all(step.tokens <= most for step in steps)
    padded = -(-tokens // BLOCK) * BLOCK
    assert steps[-1].attended + steps[-1].read == steps[-1].tokens * padded


def test_a_step_costs_by_what_is_in_it() -> None:
    seconds = 0.02 + 2 * 0.001 + 8 * 0.0015 + 3 * 0.0012 + 200 * 1e-5 + 500 * 2e-6 + 2 * 0.004
    assert LAW.work_s(Mix(2, 10, 3, 200, 500, 2)) == pytest.approx(seconds)


def test_single_tokens_of_like_contexts_are_padded_to_the_longest_and_chunks_come_alone() -> None:
    assert mix_of([(15, 1), (33, 1), (63, 1), (64, 1)], BLOCK) == Mix(4, 4, 3, 16 + 2 * 64 + 80, 0)
    assert mix_of([(0, 20), (32, 10)], BLOCK) == Mix(2, 30, 2, 0, 20 * 32 + 10 * 48, 2)
    assert mean_mix([Mix(1, 1, 1, 16, 0), Mix(3, 7, 1, 32, 8)]) == Mix(2, 4, 1, 24, 4)
