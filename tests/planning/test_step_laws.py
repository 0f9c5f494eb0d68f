"""Laws of steps: found again from what they say, and what contention does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import InvalidInput
from planning.step_laws import Mix, Observed, StepLaw, decode, fit_law, prompt_steps

LAW = StepLaw((0.02, 0.001, 0.0015, 2e-6), (1.0, 1.3, 1.9, 2.5), 0.006)


def _observed(law: StepLaw, stages: int) -> list[Observed]:
    decoding = [
        Observed(stages * law.work_s(mix) * law.slow(busy), (mix,), busy)
        for busy, mix in [(1, decode(1, 40)), (2, decode(1, 40)), (3, decode(1, 40)), (4, decode(1, 40))]
        + [(4, decode(count, context)) for count in (2, 4, 8) for context in (40, 300)]
    ]
    prompts = [
        Observed(stages * sum(map(law.work_s, steps)) * law.slow(1) + law.overhead_s, steps, 1, admitted=True)
        for steps in (prompt_steps(tokens, 256) for tokens in (8, 64, 200, 600))
    ]
    return decoding + prompts


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_law_is_found_again_from_what_it_says(stages: int) -> None:
    found = fit_law(_observed(LAW, stages), stages)
    assert found.coefficients == pytest.approx(LAW.coefficients, rel=0.02, abs=1e-7)
    assert found.slowness == pytest.approx(LAW.slowness, rel=0.02)
    assert found.overhead_s == pytest.approx(LAW.overhead_s, rel=0.1)


def test_one_wild_observation_does_not_bend_the_law() -> None:
    wild = Observed(1.0, (decode(2, 40),), 4)
    found = fit_law([*_observed(LAW, 1), wild], 1)
    assert found.work_s(decode(4, 100)) == pytest.approx(LAW.work_s(decode(4, 100)), rel=0.05)


def test_a_law_needs_observations() -> None:
    with pytest.raises(InvalidInput, match="measure the fleet first"):
        fit_law([], 1)


def test_beyond_what_was_measured_processors_are_shared() -> None:
    assert LAW.slow(8) == pytest.approx(2 * LAW.slow(4))
    assert LAW.slow(0) == LAW.slow(1) == 1.0


@given(st.integers(1, 2000), st.integers(1, 300))
@settings(deadline=None)
def test_the_steps_of_a_prompt_hold_all_its_tokens(tokens: int, most: int) -> None:
    steps = prompt_steps(tokens, most)
    assert sum(step.tokens for step in steps) == tokens
    assert all(step.tokens <= most for step in steps)
    assert steps[-1].attended == steps[-1].tokens * tokens


def test_a_step_costs_by_what_is_in_it() -> None:
    assert LAW.work_s(Mix(2, 10, 500)) == pytest.approx(0.02 + 2 * 0.001 + 8 * 0.0015 + 500 * 2e-6)
