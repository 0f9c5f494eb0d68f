"""The placement benchmark on case files that nobody recorded anything for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.alpaserve_files import read_case
from benchmarks.placement import main
from data.errors import InvalidInput
from planning.placement.policies import policy
from planning.placement.problem import Problem
from planning.simulation.requests import replay
from tests.planning.shared_fleets import GIB, arrivals, profiles

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "cases" / "alpaserve"
pytestmark = pytest.mark.slow  # on a machine that has not compiled the kernels yet


def write_case(folder: Path, name: str, *, slo_s: float) -> None:
    configs: dict[str, Any] = {
        f"1,{shape.shards},{shape.stages}": {"latency": {"1": one.latency_s}, "weight_mem": one.weight_bytes}
        for shape, one in profiles(0.1, 3.0, largest=4).items()
    }
    models = [{"id": n, "name": f"m{n}", "type": "small", "slo_s": slo_s, "rate": 2.0, "cv": 2.0} for n in range(3)]
    document = {
        "case_id": name,
        "schema": 2,
        "cluster": {"num_devices": 2, "mem_budget_bytes": 7 * GIB},
        "models": models,
        "profile": {"small": {"configs": configs}},
        "workload": {"npz": f"{name}.npz"},
    }
    (folder / f"{name}.json").write_text(json.dumps(document))
    trace = arrivals(3, duration_s=60.0, rate_rps=2.0)
    np.savez(folder / f"{name}.npz", train_arrivals=trace.times_s, train_model_ids=trace.models)


def test_a_case_without_recorded_results_is_placed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case(tmp_path, "x1", slo_s=0.5)
    write_case(tmp_path, "x2", slo_s=0.01)
    assert main(["--cases", str(tmp_path), "--out", str(tmp_path / "out"), "--budget-s", "0.2"]) == 1
    result = json.loads((tmp_path / "out" / "x1.json").read_text())
    assert result["breaches"] == []
    assert result["train"] <= result["bound"] + 1e-9
    assert result["gap"] == pytest.approx(result["bound"] - result["train"])
    assert {"op", "pp", "models"} == set(result["placement"]["groups"][0])
    assert "x1" in (tmp_path / "out" / "table.md").read_text()
    shown = " ".join(capsys.readouterr().out.split())
    assert "x2: m0 takes" in shown
    assert "m2 takes" in shown


def test_a_folder_without_cases_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cases", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no planning case" in capsys.readouterr().out


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="reference cases are not beside the repository")
@pytest.mark.parametrize("case", ["c03", "c04", "c13"])
def test_recorded_policies_are_reproduced_by_their_names(case: str) -> None:
    (file,) = REFERENCE.glob(f"{case}_*.json")
    recorded = read_case(json.loads(file.read_text()), REFERENCE)
    problem, seen = Problem(recorded.fleet, recorded.train), []
    for name, entry in recorded.recorded.items():
        if "train" in entry and name not in ("mp-search-evo20", "mp-search-op8"):
            plan = policy(name)(problem)
            seen.append(replay(problem.tables, plan, recorded.train).attainment(recorded.train))
            assert seen[-1] >= entry["train"]["attainment_warmup10"] - 0.002, name
    assert len(seen) >= 6


def test_an_unknown_policy_is_told_what_is_known() -> None:
    with pytest.raises(InvalidInput, match=r"named evolution; known are alg1-beamN.*sr-uniform"):
        policy("evolution")
