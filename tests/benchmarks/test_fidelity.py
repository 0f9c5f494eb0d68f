"""The harness of the fidelity benchmark: scripts, clients' clocks, what changes took; and, slow, a short real run."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest

from benchmarks.fidelity import shared_compare
from benchmarks.fidelity.__main__ import main
from benchmarks.fidelity.alone import NAMED, create_models
from benchmarks.fidelity.calibration import profile, rate_rps
from benchmarks.fidelity.clients import Stream, steady_s, tokens_per_s
from benchmarks.fidelity.compare import compared
from benchmarks.fidelity.crew import Job, play_all, shares_of
from benchmarks.fidelity.measure import Measured, degrees_of
from benchmarks.fidelity.page import markdown, tables, write_page
from benchmarks.fidelity.play import Played, play
from benchmarks.fidelity.recording import Recording, SharedRecording, append, read
from benchmarks.fidelity.scripts import ENGINE, INSTANCES, SCRIPTS, Deed, Script
from benchmarks.fidelity.shared_play import SharedPlayed
from benchmarks.fidelity.shared_profile import laws_of, paces_told, profile_of, speeds_of
from benchmarks.fidelity.shared_scripts import SHARED_SCRIPTS, SharedScript
from benchmarks.fidelity.steps import decoding, quality, shares, typical
from benchmarks.fidelity.watch import Watch
from data.errors import CorruptData, InvalidInput
from data.layout import Device
from data.models import ModelSpec
from perennial.demo.setting import CPU
from perennial.processes import start_command
from perennial.testing import given_plans
from planning.simulation.fleet import simulate_fleet
from planning.simulation.shared_fleet import simulate_shared
from planning.step_laws import Mix, Observed, StepLaw, mix_of, prompt_steps
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec

LAW = StepLaw((0.02, 0.001, 0.0015, 0.001, 1e-5, 0.0, 0.002), (1.0, 1.4), 0.005)
BLOCK = ENGINE.block_tokens
MACHINE = {"cpu": "any", "cores": 6}
SHORT = Script(
    "short",
    {4: "2x1x1", 3: "2x1x1", 2: "1x1x1", 1: "1x1x1"},
    20.0, 0.3, 1.0, (8, 32), (12, 32),
    (Deed(4.0, "notice", 0, 2.0), Deed(9.0, "kill", 0), Deed(14.0, "add")),
    least_requests=30,
)  # fmt: skip
_TOLERANCE, _BUSY_CORES = 0.4, 0.3


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_has_work_for_a_percentile_and_a_layout_for_every_state_it_reaches(script: Script) -> None:
    slow, quick = (script.workload(0, rate_rps) for rate_rps in (1.0, 8.0))
    assert quick == script.workload(0, 8.0) != script.workload(1, 8.0)
    assert len(slow.requests) == 500 < len(quick.requests)
    assert min(work.requests[-1].arrival_s for work in (slow, quick)) > script.deeds[-1].time_s
    live = INSTANCES
    for deed in script.deeds:
        live += 1 if deed.kind == "add" else -1
        assert 1 <= live <= INSTANCES
        replicas, (stages, shards) = degrees_of(script.layouts[live])
        assert replicas * stages * shards <= live
    measured = {degrees_of(script.layouts[count])[1] for count in range(2, INSTANCES + 1)}
    lowest = INSTANCES + min(np.cumsum([1 if deed.kind == "add" else -1 for deed in script.deeds]))
    assert {degrees_of(script.layouts[count])[1] for count in range(lowest, INSTANCES + 1)} <= measured


def test_the_scripts_differ_and_hold_notices_kills_and_additions() -> None:
    kinds = Counter(deed.kind for script in SCRIPTS for deed in script.deeds)
    assert len(SCRIPTS) >= 6
    assert min(kinds[kind] for kind in ("notice", "kill", "add")) >= 6
    assert all({"kill", "notice"} <= {deed.kind for deed in script.deeds} for script in SCRIPTS)
    shapes = {degrees_of(layout)[1] for script in SCRIPTS for layout in script.layouts.values()}
    assert {(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)} <= shapes


def test_streams_are_clocked_while_all_run() -> None:
    early = Stream(4, 0.0, [0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2])
    late = Stream(4, 0.3, [0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.3])
    assert steady_s([early, late]) == pytest.approx(0.2)
    assert (late.first_s, late.latency_s) == pytest.approx((0.1, 1.0))
    assert tokens_per_s([early, late], 0.0, 1.0) == pytest.approx(12.0)


def test_the_requests_of_a_replica_are_spread_over_its_steps_under_way() -> None:
    assert shares((1, 2, 3, 4, 5), 2) == [(1, 2, 3), (4, 5)]
    assert shares((1,), 3) == [(1,)]
    assert decoding((16, 16), 5, BLOCK) == mix_of([(18, 1), (18, 1)], BLOCK)


def test_a_typical_step_holds_requests_at_all_their_ages() -> None:
    streams = [Stream(20, 0.0, [1.0] * 5)]
    assert typical(streams, 3, BLOCK, Random(0)) == typical(streams, 3, BLOCK, Random(0))
    one = typical(streams * 2, 1, BLOCK, Random(0))
    assert one.sequences == one.calls == 1
    assert one.chunks == pytest.approx(1 / 5, abs=0.08)  # a fifth of its steps computes the prompt
    assert one.tokens == pytest.approx(1 + 19 * one.chunks)


def _decode(count: int, *contexts: int) -> Mix:
    return mix_of([(context, 1) for context in contexts] * count, BLOCK)


def _steps(law: StepLaw) -> list[Observed]:
    mixed = [_decode(1, *contexts) for contexts in ((12, 90), (20, 50, 100), (8, 30, 60, 110))]
    equal = [_decode(count, 40) for count in (2, 4, 8)]
    prompts = (prompt_steps(tokens, 256, BLOCK) for tokens in (8, 64, 200))
    return [
        *(Observed(law.work_s(_decode(1, 40)) * law.slow(busy), (_decode(1, 40),), busy) for busy in (1, 2)),
        *(Observed(law.work_s(mix) * law.slow(2), (mix,), 2) for mix in (*equal, *mixed, _decode(1, 300))),
        *(Observed(sum(map(law.work_s, one)) + law.overhead_s, one, 1, admitted=1.0) for one in prompts),
    ]


def test_a_profile_says_how_well_it_fits_and_whether_the_machine_has_changed() -> None:
    before, after = _steps(LAW), [replace(one, seconds=1.2 * one.seconds) for one in _steps(LAW)]
    assert quality(LAW, 1, [*before, *after]) == {"misfit": pytest.approx(0.083, abs=0.001), "drift": 1.2}
    assert quality(LAW, 1, before + before) == {"misfit": 0.0, "drift": 1.0}


def _measured() -> Measured:
    found = Measured([((1, 1), one) for one in _steps(LAW)])
    for what, value in (("prepare_s", 0.2), ("transfer_s", 0.02), ("slowdown", 1.1), ("settle_s", 0.06)):
        found.note(what, value, 1)
    for what, value in (("detect_s", 0.03), ("start_s", 0.5), ("start_slowdown", 0.9)):
        found.note(what, value)
    return found


def test_what_was_measured_becomes_a_profile() -> None:
    charges = _measured().charges()
    assert (charges.prepare.of(3), charges.start_slowdown, charges.detect_s) == (0.2, 1.0, 0.03)
    both = Measured()
    both.add_changes(_measured())
    both.add_changes(_measured())
    assert both.changes["settle_s"] == [(1, 0.06), (1, 0.06)]
    law = _measured().laws()[1, 1]
    assert law.work_s(_decode(4, 40)) == pytest.approx(LAW.work_s(_decode(4, 40)), rel=0.03)


def test_a_script_asks_for_a_share_of_what_its_least_layout_serves(tmp_path: Path) -> None:
    create_checkpoint(str(tmp_path / "model"), seed=0, **CPU.model)
    spec, found = read_spec(str(tmp_path / "model")), _measured()
    assert SHORT.visited == ("2x1x1", "1x1x1")
    single, double = (replace(SHORT, layouts=dict.fromkeys(SHORT.layouts, one)) for one in ("1x1x1", "2x1x1"))
    assert rate_rps(found, SHORT, spec) == rate_rps(found, single, spec) < rate_rps(found, double, spec)
    assert rate_rps(found, replace(SHORT, load=0.6), spec) == pytest.approx(2 * rate_rps(found, SHORT, spec))
    quick = Measured([(degrees, replace(one, seconds=one.seconds / 4)) for degrees, one in found.steps], found.changes)
    assert rate_rps(quick, SHORT, spec) == pytest.approx(4 * rate_rps(found, SHORT, spec), rel=0.1)


def _own_simulation(tmp_path: Path) -> tuple[Recording, ModelSpec]:
    """A run that went exactly as the simulation says."""
    create_checkpoint(str(tmp_path / "model"), seed=0, **CPU.model)
    spec, found, work = read_spec(str(tmp_path / "model")), _measured(), SHORT.workload(0, 1.5)
    book, told = given_plans(spec, SHORT.layouts), profile(found, found.charges(), spec)
    names, layout = [f"i{number}" for number in range(4)], [[Device("i0", 0)], [Device("i1", 0)]]
    served = simulate_fleet(book, told, work, [], names, layout)
    times = (each.tolist() for each in (served.arrival_s, served.first_s, served.done_s))
    rows = zip(work.requests, *times, strict=True)
    streams = [Stream(one.input_tokens, arrival, [first, done], whole=True) for one, arrival, first, done in rows]
    return Recording(
        "short", 0, MACHINE, Played(work, streams, [], names, layout, [], 0.0, [0.0] * 3, [2.0] * 3), found
    ), spec


def test_a_run_that_is_its_own_simulation_meets_the_bars(tmp_path: Path) -> None:
    recorded, spec = _own_simulation(tmp_path)
    run = compared(SHORT, 0, (recorded.played, recorded.measured), recorded.measured.charges(), spec, processors=0)
    assert run["met"]
    assert run["errors"]["mean_s"] == pytest.approx(0.0, abs=1e-6)
    assert run["errors"]["p99_s"] == pytest.approx(0.0, abs=1e-6)
    results = {"runs": [run], "shared_runs": []}
    assert [one.row_count for one in tables(results)] == [1]
    assert markdown(results).count("| short, 2x1x1 → 2x1x1 → 1x1x1 → 1x1x1 | 30 |") == 1
    write_page(tmp_path / "page.html", results)
    assert "short" in (tmp_path / "page.html").read_text()


def _shared(script: SharedScript, scale: float = 1.0) -> SharedRecording:
    """A run of a script that went as the simulation of a fleet `scale` times as slow says."""
    laws = {model: replace(LAW, slowness=(1.0, 1.0, 1.0, 1.4)) for model in script.shapes}
    steps = [(model, one) for model, law in laws.items() for one in _steps(law)]
    speeds = speeds_of(script, laws_of(script, steps))
    asks = script.asks(0, paces_told(speeds))
    profile = profile_of(script, steps, speeds, _specs())
    slow = {
        shape: replace(law, coefficients=tuple(scale * value for value in law.coefficients))
        for shape, law in profile.laws.items()
    }
    done_s = simulate_shared(script.deployment.groups, replace(profile, laws=slow), asks)
    streams = [
        Stream(ask.input_tokens, ask.arrival_s, [done] if done < float("inf") else [], whole=done < float("inf"))
        for ask, done in zip(asks, done_s.tolist(), strict=True)
    ]
    return SharedRecording(script.name, 0, MACHINE, SharedPlayed(asks, streams, steps, speeds, [0.0] * 3, [2.0] * 3))


@cache
def _specs() -> dict[str, ModelSpec]:
    with tempfile.TemporaryDirectory() as folder:
        models = create_models(Path(folder), ["chat", "code", "draft"])
        return {name: read_spec(path) for name, path in models.items()}


@pytest.mark.slow
@pytest.mark.parametrize("script", SHARED_SCRIPTS, ids=lambda script: script.name)
def test_a_shared_run_is_its_own_simulation_and_not_that_of_a_slower_fleet(script: SharedScript) -> None:
    run = shared_compare.compared(script, 0, _shared(script).played, _specs(), processors=0)
    assert run["met"]
    assert run["error"] == pytest.approx(0.0, abs=1e-9)
    assert 0.2 < run["measured"]["all"] < 1.0  # a script in which all or none are answered says nothing
    slower = shared_compare.compared(script, 0, _shared(script, 1.5).played, _specs(), processors=0)
    assert slower["error"] > shared_compare.ATTAINMENT_BAR
    assert not slower["met"]


def test_the_shared_scripts_differ() -> None:
    assert len(SHARED_SCRIPTS) >= 4
    assert {len(script.demands) for script in SHARED_SCRIPTS} == {2, 3}
    assert max(demand.cv for script in SHARED_SCRIPTS for demand in script.demands) > 2
    assert any(
        demand.load * len(script.groups) > script.hosting(demand.model)  # more than its groups can do for it alone
        for script in SHARED_SCRIPTS
        for demand in script.demands
    )
    assert {group.stages for script in SHARED_SCRIPTS for group in script.groups} == {1, 2}


def test_some_models_keep_all_groups_of_a_script_busy() -> None:
    covers = {script.name: script.cover for script in SHARED_SCRIPTS}
    assert covers["two models, steady"] == ("chat",)
    assert covers["three models, one overloaded"] == ("chat", "code")
    assert covers["three models, partly shared"] == ("chat", "draft")


def test_recorded_runs_are_compared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, shared = _own_simulation(tmp_path)[0], _shared(SHARED_SCRIPTS[0])
    path = tmp_path / "recordings.jsonl"
    append(path, alone)
    append(path, shared)
    assert list(read([path])) == [alone, shared]
    monkeypatch.setitem(NAMED, "short", SHORT)
    assert main(["--out", str(tmp_path / "out"), "--recorded", str(path)]) == 0
    written = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert written["machine"] == MACHINE
    assert [run["met"] for run in (*written["runs"], *written["shared_runs"])] == [True, True]
    monkeypatch.delitem(NAMED, "short")
    assert main(["--out", str(tmp_path / "out"), "--recorded", str(path)]) == 2
    with pytest.raises(InvalidInput, match=r"cannot read .*absent"):
        read([tmp_path / "absent"])
    path.write_text("{}\n")
    with pytest.raises(CorruptData, match="record them again"):
        read([path])


def test_fleets_side_by_side_have_processors_of_their_own() -> None:
    assert shares_of(range(17), 2) == [list(range(8)), list(range(8, 16))]
    assert shares_of([3, 5], 1) == [[3, 5]]
    with pytest.raises(InvalidInput, match=r"4 fleets side by side need at least 8 processors.*from 1 to 3"):
        shares_of(range(7), 4)


def test_too_many_fleets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--jobs", "4000"]) == 2
    assert "choose --jobs from 1 to" in capsys.readouterr().err


@pytest.mark.slow  # a process that imports the engine
async def test_what_cannot_be_played_is_said_and_nothing_is_recorded(tmp_path: Path) -> None:
    share = sorted(os.sched_getaffinity(0))
    (said,) = await play_all([Job("no such script", 3)], [share], tmp_path / "recordings.jsonl")
    assert said.startswith("no such script, seed 3: ")
    assert "KeyError" in said
    assert not os.listdir(tmp_path)


async def test_the_watch_samples_others_and_the_probe() -> None:
    watch, begun_s = Watch(), time.monotonic()
    watching = asyncio.create_task(watch.watch())
    async with asyncio.timeout(10):
        while not watch.cores:  # noqa: ASYNC110 - a sampler has no event
            await asyncio.sleep(0.05)
    watching.cancel()
    assert len(watch.probes) >= 4
    now_s = time.monotonic()
    assert min(watch.probe_ms(begun_s, now_s)) > 0
    assert min(watch.foreign_cores(begun_s, now_s)) >= 0
    assert watch.probe_ms(0.0, 0.0, 1.0) == watch.foreign_cores(0.0, 0.0, 1.0) == [0.0, 0.0]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_short_real_run_is_predicted(tmp_path: Path) -> None:
    create_checkpoint(str(tmp_path / "model"), seed=0, **CPU.model)
    home = tmp_path / "home"
    played, found = asyncio.run(play(SHORT, 0, str(tmp_path / "model"), home, start_command))
    if max(played.foreign_cores) > _BUSY_CORES:
        pytest.skip(f"other programs used {max(played.foreign_cores):.1f} processors: a profile says little then")
    spec = read_spec(str(tmp_path / "model"))
    run = compared(SHORT, 0, (played, found), found.charges(), spec, processors=len(os.sched_getaffinity(0)))
    assert abs(run["errors"]["mean_s"]) < _TOLERANCE, run["errors"]
    # Where a kill hits a replica that has no requests at that moment there is nothing to carry out: the layout in force
    # is what is left. With few requests that may be so in one of the two only.
    simulated, measured = ([one["config"] for one in run["changes"][of]] for of in ("simulated", "measured"))
    assert (simulated[0], simulated[-1]) == (measured[0], measured[-1])
