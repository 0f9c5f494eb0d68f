from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from data.errors import InvalidInput
from flows import study_inputs
from flows.evaluate import EvaluateResult, evaluate_with
from flows.progress import listening
from flows.study_inputs import EvaluateRequest, study_key
from flows.tracking import place
from planning.study.study import Study
from profiling.campaign import Progress
from tests.planning.test_costs import profile

pytestmark = [pytest.mark.usefixtures("prefect"), pytest.mark.slow]  # compiles the kernels of both simulations


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    profile().write(home / "profile")
    (home / "fleet.csv").write_text("t_ms,instances\n0,3\n60000,2\n100000,3\n180000,2\n240000,2\n")
    return home


def _request(home: Path, **changes: Any) -> EvaluateRequest:
    fields = {
        "profile": str(home / "profile"), "availability": [str(home / "fleet.csv")], "instances": 3, "rate_rps": 5.0,
        "policies": ["perennial", "spotserve-new"], "seeds": 2, "home": str(home), "spot_usd_h": 1.0,
        "on_demand_usd_h": 3.0,
    }  # fmt: skip
    return EvaluateRequest(**{**fields, **changes})


@pytest.fixture(scope="module")
def first(prefect: str, home: Path) -> tuple[EvaluateResult, list[Progress]]:
    seen: list[Progress] = []
    with listening(seen.append):
        return evaluate_with(_request(home)), seen


def test_every_cell_is_simulated_and_told(first: tuple[EvaluateResult, list[Progress]]) -> None:
    result, seen = first
    assert [step.done for step in seen] == list(range(seen[-1].total + 1))
    rows = {row["policy"]: row for row in result["rows"]}
    assert {"perennial", "spotserve-new", "on-demand 3"} <= rows.keys()
    assert rows["perennial"]["seeds"] == 2
    assert rows["perennial"]["p99_s"] < rows["spotserve-new"]["p99_s"]
    written = json.loads(Path(result["results"]).read_text(encoding="utf-8"))
    assert len(written["results"]) == seen[-1].total


def test_the_page_is_one_file(first: tuple[EvaluateResult, list[Progress]]) -> None:
    page = Path(first[0]["page"]).read_text(encoding="utf-8")
    assert page.count("<figure") == 4
    for words in ("SpotServe, new batching", "on demand, by size", "tiny on instances"):
        assert words in page
    assert "src=" not in page
    assert 'href="http' not in page


def test_mlflow_has_a_run_for_each_policy_under_one_for_the_study(
    first: tuple[EvaluateResult, list[Progress]], home: Path
) -> None:
    client = MlflowClient(place(str(home))[0])
    parent = client.get_run(first[0]["run_id"])
    names = {entry.path for entry in client.list_artifacts(parent.info.run_id)}
    assert names >= {"study.html", "study.json", "p99.png", "over_time.png", "frontier.png", "bytes.png"}
    runs = client.search_runs(
        [parent.info.experiment_id], filter_string=f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert {run.data.params["policy"] for run in runs} == {"perennial", "spotserve-new"}
    for run in runs:
        assert {"mean_s", "p50_s", "p90_s", "p99_s", "unfinished", "usd", "moved_gb", "longest_pause_s"} == set(
            run.data.metrics
        )


def test_what_was_simulated_before_is_not_simulated_again(
    first: tuple[EvaluateResult, list[Progress]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Study, "run", lambda *_: pytest.fail("simulated again"))
    again = evaluate_with(_request(home))
    assert again["rows"] == first[0]["rows"]
    assert again["page"] == first[0]["page"]


def test_results_are_known_by_the_contents_of_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = study_key(_request(home))
    assert study_key(_request(home, seeds=5, policies=["oracle"], workers=1)) == key
    assert study_key(_request(home, cv=2.0)) != key
    monkeypatch.setattr(study_inputs, "_simulator_sha256", lambda: "another")
    assert study_key(_request(home)) != key


def test_failures_reach_the_caller_as_they_are(home: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no policy 'best'"):
        evaluate_with(_request(home, policies=["best"]))
