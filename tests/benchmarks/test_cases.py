"""The case checker: what it meets, what it must miss, and what it makes of files it does not know."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import as_json, check_folder, main
from benchmarks.checks import FileReport
from benchmarks.spotserve_cases import CHECKERS

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "cases" / "spotserve"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="reference cases are not beside the repository")


def reports(folder: Path) -> dict[str, FileReport]:
    return {report.file.split("/")[-1]: report for report in check_folder(folder)}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    folder = tmp_path / "cases"
    folder.mkdir()
    for file in REFERENCE.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def change(path: Path, edit: Any) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


@needs_reference
def test_every_reference_case_is_met() -> None:
    found = reports(REFERENCE)
    for name in CHECKERS:
        assert found[name].verdicts, name
        assert not found[name].missed, (name, found[name].worst)


def _spoil_layout(document: dict[str, Any]) -> None:
    document["cases"][0]["expected"]["total_weight"] *= 1.1


def _spoil_row(column: str) -> Any:
    def edit(document: dict[str, Any]) -> None:
        document["rows"][-1][document["columns"].index(column)] += 1

    return edit


def _spoil_replay(document: dict[str, Any]) -> None:
    document["records"][-1]["next_config"]["P"] += 1


def _spoil_simulation(document: dict[str, Any]) -> None:
    document.update(on_demand=document["on_demand"][-1:], spotserve=document["spotserve"][-1:])
    document["spotserve"][0]["p99_s"] *= 1.5


SPOILED = {
    "optimizer.json": _spoil_row("D"),
    "latency_table.json": _spoil_row("t1_ms"),
    "device_mapping.json": _spoil_layout,
    "layer_order.json": lambda d: d["cases"][0]["expected"]["order"].reverse(),
    "arranger.json": lambda d: d["cases"][0]["expected_by_batch"]["1"]["steps"][3].__setitem__(1, 7777),
    "replay.json": _spoil_replay,
    "rerouting.json": lambda d: d["cases"][0].update(P=9),
    "simulation.json": _spoil_simulation,
    "traces.json": lambda d: d["traces"]["A_S"].update(min=0),
    "traces_extra.json": lambda d: next(iter(d["traces"].values()))["events"][0].update(available_after=99),
    "trace_g4dn_full.json": lambda d: d.update(n_adds=1),
    "arrival_stats.json": lambda d: next(row for row in d["rows"] if row["array"]).update(cv=6.0),
    "published.json": lambda d: d["table1"][0].update(cost_model_ms=1.0),
}


@needs_reference
@pytest.mark.parametrize("name", CHECKERS)
def test_a_changed_expectation_is_missed(copied: Path, name: str) -> None:
    inputs = {"simulation.json": {"traces.json"}, "rerouting.json": {"replay.json"}}.get(name, set())
    for other in CHECKERS.keys() - {name} - inputs:
        (copied / other).unlink()
    change(copied / name, SPOILED[name])
    assert reports(copied)[name].missed


@needs_reference
def test_exit_codes_and_json(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for slow in ("simulation.json", "replay.json", "latency_table.json"):
        (copied / slow).unlink()
    assert main([str(copied), "--out", str(tmp_path / "out")]) == 0
    change(copied / "optimizer.json", SPOILED["optimizer.json"])
    assert main([str(copied), "--out", str(tmp_path / "out")]) == 1
    written = json.loads((tmp_path / "out" / "cases.json").read_text())
    (missed,) = (file for file in written["files"] if file["missed"])
    assert missed["file"] == "cases/optimizer.json"
    assert missed["met"] == missed["cases"] - 1
    assert main([str(tmp_path / "absent")]) == 2
    assert "not a folder" in capsys.readouterr().out


@needs_reference
def test_missing_inputs_are_named_not_failed(copied: Path) -> None:
    (copied / "arrivals.npz").unlink()
    found = reports(copied)
    assert found["arrival_stats.json"].note == "not checked: arrivals.npz is missing"
    assert found["device_mapping.json"].verdicts
    assert not found["device_mapping.json"].missed


@needs_reference
def test_rows_alone_are_checked_with_the_published_profiles(copied: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(copied / "optimizer.json", alone / "optimizer_even.json")
    report = reports(alone)["optimizer_even.json"]
    assert len(report.verdicts) > 900
    assert not report.missed


def test_other_files_and_damaged_ones(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "planner.json").write_text("{}")
    (tmp_path / "traces.json").write_text('{"another": "format"}')
    (tmp_path / "optimizer.json").write_text('{"rows": [')
    (tmp_path / "layer_order.json").write_text('{"cases": [{"id": "x"}]}')
    found = reports(tmp_path)
    assert found["planner.json"].note == "no checker yet"
    assert found["traces.json"].note.startswith("no checker yet")
    assert "cannot be read" in found["optimizer.json"].missed[0].detail
    assert "cannot be checked" in found["layer_order.json"].missed[0].detail
    json.dumps(as_json(list(found.values())), allow_nan=False)
