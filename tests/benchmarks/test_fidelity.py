"""The harness of the fidelity benchmark: scripts, clients' clocks, what changes took; and, slow, a short real run."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fidelity.clients import Stream, steady_s, tokens_per_s
from benchmarks.fidelity.compare import compared, profile
from benchmarks.fidelity.measure import Measured, degrees_of, plans_of
from benchmarks.fidelity.page import markdown, table, write_page
from benchmarks.fidelity.play import Played, play
from benchmarks.fidelity.scripts import INSTANCES, SCRIPTS, Deed, Script
from data.layout import Device
from perennial.demo.setting import CPU
from perennial.processes import start_command
from perennial.testing import given_plans
from planning.simulation.fleet import simulate_fleet
from planning.step_laws import Observed, StepLaw, decode, prompt_steps
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec

LAW = StepLaw((0.02, 0.001, 0.0015, 0.0), (1.0, 1.4), 0.005)
SHORT = Script(
    "short",
    {4: "2x1x1", 3: "2x1x1", 2: "1x1x1", 1: "1x1x1"},
    30, 1.5, 1.0, (8, 32), (12, 32),
    (Deed(4.0, "notice", 0, 2.0), Deed(9.0, "kill", 0), Deed(14.0, "add")),
)  # fmt: skip
_TOLERANCE, _BUSY_CORES = 0.4, 0.3


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_has_work_for_a_percentile_and_a_layout_for_every_state_it_reaches(script: Script) -> None:
    work = script.workload(0)
    assert work == script.workload(0) != script.workload(1)
    assert len(work.requests) >= 100
    assert work.requests[-1].arrival_s > script.deeds[-1].time_s
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


@pytest.mark.parametrize(
    ("count", "replicas", "stages", "plans"),
    [(1, 3, 1, (1, 1)), (3, 3, 1, (1, 3)), (6, 3, 1, (2, 3)), (3, 1, 3, (1, 3)), (8, 1, 3, (3, 3)), (4, 1, 3, (2, 2)),
     (3, 2, 2, (1, 3)), (16, 2, 2, (4, 4))],
)  # fmt: skip
def test_how_requests_share_steps_and_stages(count: int, replicas: int, stages: int, plans: tuple[int, int]) -> None:
    assert plans_of(count, replicas, stages) == plans


def _measured() -> Measured:
    found = Measured()
    found.steps[1, 1] = [
        *(Observed(LAW.work_s(mix) * LAW.slow(busy), (mix,), busy) for busy in (1, 2) for mix in (decode(1, 40),)),
        *(Observed(LAW.work_s(mix) * LAW.slow(2), (mix,), 2) for mix in (decode(4, 40), decode(8, 40))),
        *(
            Observed(sum(map(LAW.work_s, steps)) + LAW.overhead_s, steps, 1, admitted=True)
            for steps in (prompt_steps(tokens, 256) for tokens in (8, 64, 200))
        ),
    ]
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
    assert law.work_s(decode(4, 40)) == pytest.approx(LAW.work_s(decode(4, 40)), rel=0.03)


def test_a_run_that_is_its_own_simulation_meets_the_bars(tmp_path: Path) -> None:
    create_checkpoint(str(tmp_path / "model"), seed=0, **CPU.model)
    spec, found, work = read_spec(tmp_path / "model"), _measured(), SHORT.workload(0)
    book, told = given_plans(spec, SHORT.layouts), profile(found, found.charges(), spec)
    names, layout = [f"i{number}" for number in range(4)], [[Device("i0", 0)], [Device("i1", 0)]]
    served = simulate_fleet(book, told, work, [], names, layout)
    rows = zip(work.requests, served.arrival_s, served.first_s, served.done_s, strict=True)
    streams = [Stream(one.input_tokens, arrival, [first, done]) for one, arrival, first, done in rows]
    run = compared(SHORT, 0, Played(book, work, streams, [], names, layout, [], 0.0, [0.0, 0.0, 0.0]), told)
    assert run["met"]
    assert run["errors"]["mean_s"] == pytest.approx(0.0, abs=1e-6)
    assert run["errors"]["p99_s"] == pytest.approx(0.0, abs=1e-6)
    assert table([run]).row_count == 1
    assert markdown([run]).count("| short, 2x1x1 → 2x1x1 → 1x1x1 → 1x1x1 | 30 |") == 1
    write_page(tmp_path / "page.html", {"runs": [run]})
    assert "short" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_short_real_run_is_predicted(tmp_path: Path) -> None:
    create_checkpoint(str(tmp_path / "model"), seed=0, **CPU.model)
    home = tmp_path / "home"
    played, found = asyncio.run(play(SHORT, 0, str(tmp_path / "model"), home, start_command))
    if max(played.foreign_cores) > _BUSY_CORES:
        pytest.skip(f"other programs used {max(played.foreign_cores):.1f} processors: a profile says little then")
    run = compared(SHORT, 0, played, profile(found, found.charges(), read_spec(tmp_path / "model")))
    assert abs(run["errors"]["mean_s"]) < _TOLERANCE, run["errors"]
    assert [one["config"] for one in run["changes"]["simulated"]] == [
        one["config"] for one in run["changes"]["measured"]
    ]
