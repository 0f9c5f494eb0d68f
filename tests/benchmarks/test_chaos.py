import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.chaos.play import MODEL, Outcome, play, record, request_pool
from benchmarks.chaos.script import script
from perennial.comparison import Difference
from perennial.reference import reference_streams
from serving.engine.checkpoint import create_checkpoint


@given(st.integers(0, 100_000))
@settings(deadline=None, max_examples=80)
def test_a_seed_is_a_script(seed: int) -> None:
    drawn = script(seed, pool=48)
    assert drawn == script(seed, pool=48)
    assert 2 <= drawn.instances <= 4
    assert len({index for _, index, _ in drawn.requests}) == len(drawn.requests)
    assert all(0 <= item.seconds <= 10 for item in drawn.disturbances)


def test_fifty_seeds_disturb_in_every_way_at_every_moment() -> None:
    drawn = [item for seed in range(50) for item in script(seed, pool=48).disturbances]
    kinds = {"notice", "kill", "kill_worker", "suspend", "add", "controller", "blackout"}
    assert {item.kind for item in drawn} == kinds
    moments = {"delay", "prefill", "reconfiguration_started", "reconfiguration_prepared", "layout"}
    assert {item.moment for item in drawn} == moments
    graces = {item.seconds for item in drawn if item.kind == "notice"}
    assert {0.0, 10.0} <= graces
    follow_ups = {item.kind for item in drawn if item.moment == "reconfiguration_prepared"}
    assert {"kill", "controller", "notice"} <= follow_ups


def test_requests_are_greedy_and_sampled_and_cancelled() -> None:
    pool = request_pool(48)
    sampled = [request for request in pool if request.sampling.temperature > 0]
    assert 10 < len(sampled) < 38
    assert any(cut is not None for seed in range(5) for _, _, cut in script(seed, pool=48).requests)
    assert all(len(request.prompt) + request.limits.max_tokens <= MODEL["max_positions"] for request in pool)


def test_an_outcome_fails_on_any_difference_or_error() -> None:
    assert Outcome(0).held
    assert not Outcome(0, difference=Difference(duplicated=1)).held
    assert not Outcome(0, errors=["a stream did not end"]).held


@pytest.mark.slow
def test_a_few_seeds_hold(tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "model")
    create_checkpoint(checkpoint, **MODEL)
    pool = request_pool(48)
    reference = reference_streams(checkpoint, pool)
    for seed in (101, 102):
        drawn = script(seed, pool=48)
        outcome = asyncio.run(play(drawn, checkpoint, pool, reference, tmp_path / str(seed)))
        assert outcome.held, record(drawn, outcome)
        assert outcome.streams == len(drawn.requests) + 1
