import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.chaos.hard import CAUSES, FOLLOW_UPS, PHASES, hard_script
from benchmarks.chaos.outcome import MOST_REEXECUTED, Outcome, record, recovered, totals
from benchmarks.chaos.play import MODEL, Stage, play, request_pool
from benchmarks.chaos.script import script
from benchmarks.chaos.strikes import ends_of_a_transfer, reached
from perennial.comparison import Difference
from perennial.reference import reference_streams
from serving.engine.checkpoint import create_checkpoint
from serving.requests import Event


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


@given(st.integers(0, 100_000))
@settings(deadline=None, max_examples=80)
def test_a_seed_is_a_hard_script(seed: int) -> None:
    drawn = hard_script(seed, pool=48)
    assert drawn == hard_script(seed, pool=48)
    assert 2 <= drawn.instances <= max(drawn.layouts)
    assert drawn.layouts.keys() == drawn.other_layouts.keys()
    for layout in (*drawn.layouts.values(), *drawn.other_layouts.values()):
        assert all(degree in "x123456" for degree in layout)
    assert all(0 <= item.seconds <= 5 for item in drawn.disturbances)


def test_two_hundred_hard_seeds_strike_in_every_way_in_every_phase() -> None:
    drawn = [item for seed in range(200) for item in hard_script(seed, pool=48).disturbances]
    assert {item.kind for item in drawn} == {*CAUSES, *FOLLOW_UPS}
    struck = {(item.kind, item.moment) for item in drawn}
    assert {(kind, phase) for kind in FOLLOW_UPS for phase in PHASES} <= struck
    assert 0.0 in {item.seconds for item in drawn if item.kind == "notice"}


def test_a_few_dozen_hard_seeds_in_a_row_have_every_cause_and_every_follow_up() -> None:
    drawn = [item for seed in range(700, 736) for item in hard_script(seed, pool=48).disturbances]
    assert {item.kind for item in drawn} == {*CAUSES, *FOLLOW_UPS}
    assert {item.moment for item in drawn} >= set(PHASES)


def test_hard_runs_have_small_caches_several_devices_and_long_prompts() -> None:
    drawn = [hard_script(seed, pool=48) for seed in range(40)]
    assert {one.kv_blocks for one in drawn} == {0, 72, 96}
    assert {one.devices_per_instance for one in drawn} == {1, 2}
    pool = request_pool(48, hard=True)
    assert max(len(request.prompt) for request in pool) > 800
    longest = max(len(request.prompt) + request.limits.max_tokens for request in pool)
    assert longest <= min(MODEL["max_positions"], 72 * 16)


def test_a_moment_has_come_with_any_later_one() -> None:
    assert "layout" in reached("reconfiguration_copying")
    assert "reconfiguration_started" not in reached("reconfiguration_copying")
    assert "reconfiguration_failed" in reached("layout")


def test_the_ends_of_a_transfer_are_one_with_state_and_one_without() -> None:
    live = ["i0", "i1", "i2"]
    for victim in range(12):
        source, target = ends_of_a_transfer(live, {"i0", "i1"}, victim)
        assert source in ("i0", "i1")
        assert target == "i2"
        assert len(set(ends_of_a_transfer(live, set(live), victim))) == 2
    assert ends_of_a_transfer(["i0"], {"i0"}, 5) == ["i0"]


def test_what_layouts_say_about_requests_is_summed() -> None:
    told: list[tuple[str, dict[str, object]]] = [
        ("controller_started", {}),
        ("layout", {"requests_moved": 2, "requests_replayed": 1}),
        ("worker_lost", {"device": "i0/1"}),
        ("instance_lost", {"instance": "i0"}),
        (
            "layout",
            {
                "requests_restored": 4,
                "requests_replayed": 1,
                "tokens_reexecuted": [0, 2, 1],
                "tokens_reexecuted_uncopied": [7],
                "tokens_replayed": {"copied": [9], "uncopied": [30], "unseated": [40]},
            },
        ),
        ("instance_lost", {"instance": "i1"}),
        ("instance_lost", {"instance": "i2"}),
        ("layout", {"requests_replayed": 5, "tokens_replayed": {"copied": [11]}}),
        ("controller_started", {}),
        ("layout", {"requests_replayed": 4, "tokens_reexecuted": []}),
    ]
    events = [Event(sequence=0, time_s=0.0, kind=kind, data=data) for kind, data in told]
    counts = recovered(events)
    assert counts == {
        "moved": 2,
        "restored": 4,
        "restored_uncopied": 1,
        "replayed": 7,
        "replayed_after_one_loss": 2,
        "replayed_after_restart": 4,
        "most_reexecuted": 2,
        "most_reexecuted_uncopied": 7,
        "most_replayed": 9,
    }
    assert counts["most_reexecuted"] <= MOST_REEXECUTED
    summary = totals([Outcome(0, recovered=counts), Outcome(1, recovered=counts)], wall_s=1.0)
    assert (summary["requests_replayed"], summary["most_reexecuted"]) == (14, 2)


def test_an_outcome_fails_on_any_difference_or_error() -> None:
    assert Outcome(0).held
    assert not Outcome(0, difference=Difference(duplicated=1)).held
    assert not Outcome(0, errors=["a stream did not end"]).held


@pytest.mark.slow
@pytest.mark.parametrize("hard", [False, True])
def test_a_few_seeds_hold(tmp_path: Path, hard: bool) -> None:
    checkpoint = str(tmp_path / "model")
    create_checkpoint(checkpoint, **MODEL)
    pool = request_pool(48, hard=hard)
    stage = Stage(checkpoint, pool, reference_streams(checkpoint, pool))
    for seed in (101, 102):
        drawn = (hard_script if hard else script)(seed, pool=48)
        outcome = asyncio.run(play(drawn, stage, tmp_path / str(seed)))
        assert outcome.held, record(drawn, outcome)
        assert outcome.streams == len(drawn.requests) + 1
