from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from data.errors import InvalidInput, PerennialError
from data.profile import Profile
from flows.publish import publish
from flows.registry import CHAMPION, Release, open_registry
from perennial.commands import planning, plans
from tests.flows.books import LOCAL, book, grid, journey, profile, shared

app = typer.Typer()
planning.register(app)
plans.register(app)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERENNIAL_HOME", str(tmp_path))
    return tmp_path


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "200"})


def test_versions_are_listed_shown_compared_promoted_and_rolled_back(home: Path) -> None:
    registry = open_registry(str(home))
    for batch in (1, 2):
        publish(registry, Release(book(batch), profile()), CHAMPION)
    name = "plan.tiny-llama.local-4"
    listed = _run("plans", "list").stdout
    assert listed.index("champion") < listed.index("last-good")
    shown = _run("plans", "show", "1").stdout
    assert "D1·P3·T1·B1" in shown
    assert "local-cpu=3: lowest latency | of all" in shown
    assert "D1·P2·T1·B2" in _run("plans", "diff", "1", "2").stdout
    assert "same configurations" in _run("plans", "diff", "1", "1").stdout
    assert "version 1 is champion again" in _run("plans", "rollback").stdout
    assert registry.aliases(name)[CHAMPION] == "1"
    assert "version 2 is now champion" in _run("plans", "promote", "2").stdout
    assert registry.aliases(name)[CHAMPION] == "2"
    with pytest.raises(PerennialError, match="perennial plans list"):
        _run("plans", "show", "9")


def test_a_state_is_explained_with_what_runs(home: Path) -> None:
    publish(open_registry(str(home)), Release(journey(), profile()), CHAMPION)
    shown = _run("plans", "show").stdout
    assert "takes for granted: nothing is lost" in shown
    assert "1 GB in 2 s, then 0.25 s of pause" in shown
    assert "one local-cpu less: becomes D1·P2·T1·B4" in shown
    staying = _run("plans", "show", "--state", "local-cpu=3", "--now", "D1·P2·T1·B4").stdout
    assert "local-cpu=3: D1·P2·T1·B4 from D1·P2·T1·B4" in staying
    assert "3 GB in 4 s, then 0.5 s of pause" in staying
    assert "one local-cpu less: stays D1·P2·T1·B4" in staying
    with pytest.raises(InvalidInput, match="write one like D2"):
        _run("plans", "show", "--state", "local-cpu=3", "--now", "2x2")


def test_books_of_several_models_have_the_same_commands(home: Path) -> None:
    for batch in (2, 4):
        publish(open_registry(str(home)), Release(shared(batch)), CHAMPION)
    shown = _run("plans", "show").stdout
    assert "more is asked of chat." in shown
    assert "2×P1·T1(chat·B4, code·B4)" in shown
    assert "local-cpu=2: as before" in shown
    assert "local-cpu=2" not in _run("plans", "show", "--state", "local-cpu=1").stdout
    assert "P1·T1(chat·B2, code·B2)" in _run("plans", "diff", "1", "2").stdout
    assert "version 1 is champion again" in _run("plans", "rollback").stdout


def test_a_plan_is_of_one_thing(home: Path) -> None:
    for options in ([], ["--fleet", "f", "--profile", "p"], ["--profile", "p", "--recent", "r"]):
        with pytest.raises(InvalidInput, match="name a checkpoint, a --profile or a --fleet file"):
            _run("plan", *options)
    with pytest.raises(InvalidInput, match="cannot read the fleet file"):
        _run("plan", "--fleet", str(home / "absent.json"))


@pytest.mark.slow
def test_several_models_are_planned_and_compared_with_recent_requests(home: Path) -> None:
    grid().write(home / "measured")
    told = {"profile": "measured", "slo_s": 30.0, "rate_rps": 1.0, "output_tokens": 16}
    cluster = {"type": "local-cpu", "instances": 2}
    (home / "fleet.json").write_text(json.dumps({"cluster": cluster, "models": {"a": told, "b": told}}))
    planning = ("plan", "--fleet", str(home / "fleet.json"), "--budget-s", "0.2")
    first = _run(*planning).stdout
    assert "plan.a-b.local-cpu-2 version 1 (champion)" in first
    assert "100.0%" in first
    rows = "".join(f"{0.25 * number},{'aaab'[number % 4]},64,16\n" for number in range(800))
    (home / "recent.csv").write_text(f"arrival_s,model,input_tokens,output_tokens\n{rows}")
    drifted = _run(*planning, "--recent", str(home / "recent.csv")).stdout
    assert "requests/s of a: 1 assumed, 3 seen" in drifted
    assert "version 2 (challenger)" in drifted
    assert "(challenger) counts on; nothing is planned" in _run(*planning, "--recent", str(home / "recent.csv")).stdout


def test_an_empty_registry_says_how_to_fill_it(home: Path) -> None:
    with pytest.raises(InvalidInput, match="make one with `perennial plan`"):
        _run("plans", "show")


def test_wrong_values_are_refused_before_anything_runs(home: Path) -> None:
    with pytest.raises(InvalidInput, match="policy"):
        _run("plan", "--profile", str(home), "--policy", "best")
    (home / "cluster.json").write_text("{")
    with pytest.raises(PerennialError, match=r"cluster\.json is not JSON"):
        _run("plan", "--profile", str(home), "--cluster", str(home / "cluster.json"))
    with pytest.raises(InvalidInput):
        _run("plan", "--profile", str(home), "--type", "abacus")


@pytest.mark.slow
def test_a_machine_without_prefect_and_mlflow_measures(home: Path) -> None:
    """A GPU node: the same command, in an interpreter in which neither can be imported."""
    from serving.engine.checkpoint import create_checkpoint

    create_checkpoint(str(home / "tiny"), family="llama", layers=2, hidden=32, heads=2, kv_heads=1, ffn=64, vocab=300)
    code = f"""
import importlib.util, sys
absent = ("prefect", "mlflow", "matplotlib", "cvxpy")
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in absent else find(name, package)
sys.modules.update(dict.fromkeys(absent))
import typer
from perennial.commands import planning
app = typer.Typer(pretty_exceptions_enable=False)
planning.register(app)
app(["profile", {str(home / "tiny")!r}, "--max-shards", "1", "--budget", "0.5", "--out", {str(home / "out")!r}])
"""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    assert Profile.read(home / "out").model.name == "tiny"
    assert "cost model error" in done.stdout


def test_a_fleet_can_be_given_as_a_file(home: Path) -> None:
    from data.cluster import ClusterSpec

    fleet = ClusterSpec("mine", (LOCAL,), (2,))
    (home / "fleet.json").write_text(json.dumps(fleet.to_json()))
    assert planning._cluster(home / "fleet.json", "local-cpu", 4, 0.0) == fleet
    assert planning._cluster(None, "local-cpu", 3, 64.0).types[0].memory_bytes == 64_000_000
