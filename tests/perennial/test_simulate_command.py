from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from data.errors import InvalidInput
from flows import local
from flows.study_inputs import DEFAULT_POLICIES, EvaluateRequest
from perennial.commands import make, simulate
from perennial.commands.planning import pairs
from planning.study.systems import SYSTEMS

app = typer.Typer()
simulate.register(app)
make.register(app)  # one command alone would lose its name

ROW = {
    "trace": "calm", "policy": "perennial", "mean_s": 1.5, "p90_s": 2.0, "p99_s": None, "unfinished": 3.0, "usd": 6.789,
    "moved_gb": 12.4, "longest_pause_s": 0.5,
}  # fmt: skip


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[EvaluateRequest]:
    """What the command asks of the flow; `tests/flows` runs it."""
    asked: list[EvaluateRequest] = []

    def run(request: EvaluateRequest, *, on_progress: Any) -> dict[str, Any]:
        asked.append(request)
        return {"page": "here.html", "results": "here.json", "run_id": "1", "rows": [ROW]}

    monkeypatch.setenv("PERENNIAL_HOME", str(tmp_path))
    monkeypatch.setattr(local, "run_evaluate", run)
    return asked


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False, env={"COLUMNS": "200"})


def test_a_table_and_the_page(asked: list[EvaluateRequest]) -> None:
    shown = _run("--seeds", "2").stdout
    assert all(words in shown for words in ("calm", "never", "6.79", "here.html"))
    assert (asked[0].policies, asked[0].seeds) == (DEFAULT_POLICIES, 2)


def test_policies_by_name_or_all(asked: list[EvaluateRequest], tmp_path: Path) -> None:
    _run("--policies", "perennial, oracle", "--out", str(tmp_path / "out"))
    _run("--policies", "all", "--availability", "a.csv", "--availability", "b.csv")
    assert asked[0].policies == ["perennial", "oracle"]
    assert asked[0].out == str(tmp_path / "out")
    assert asked[1].policies == list(SYSTEMS)
    assert [Path(file).name for file in asked[1].availability] == ["a.csv", "b.csv"]


@pytest.mark.parametrize(("option", "value"), [("--seeds", "0"), ("--rate", "-1"), ("--duration", "0")])
def test_wrong_values_are_refused_before_anything_runs(asked: list[EvaluateRequest], option: str, value: str) -> None:
    with pytest.raises(InvalidInput, match="greater than"):
        _run(option, value)
    assert not asked


def test_keys_and_their_values() -> None:
    assert pairs(["nodes=16-node", "zone=a=b"]) == {"nodes": "16-node", "zone": "a=b"}
    assert pairs(None) == {}
    for wrong in ("nodes", "=4", "nodes="):
        with pytest.raises(InvalidInput, match="write KEY=VALUE"):
            pairs([wrong])
