from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from prefect import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from data.cluster import ClusterSpec
from data.errors import InvalidInput, PerennialError
from data.plan import PlanBook
from data.profile import Profile
from flows import profile as profile_flow
from flows.plan import PlanRequest, PlanResult, plan, search_key
from flows.profile import ProfileRequest
from flows.progress import listening
from flows.registry import open_registry
from profiling.campaign import Progress
from serving.engine.checkpoint import create_checkpoint
from tests.flows.books import LOCAL

pytestmark = pytest.mark.usefixtures("prefect")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    create_checkpoint(str(home / "tiny"), family="llama", layers=2, hidden=32, heads=2, kv_heads=1, ffn=64, vocab=300)
    return home


def _request(home: Path, **changes: object) -> PlanRequest:
    measured = ProfileRequest(checkpoint=str(home / "tiny"), home=str(home), max_shards=2, budget_s=1.0)
    cluster = ClusterSpec("local-3", (LOCAL,), (3,)).to_json()
    fields = {"cluster": cluster, "measure": measured, "home": str(home), "input_tokens": 16, "output_tokens": 8}
    return PlanRequest(**{**fields, **changes})


@pytest.fixture(scope="module")
def first(prefect: str, home: Path) -> tuple[PlanResult, list[Progress]]:
    seen: list[Progress] = []
    with listening(seen.append):
        return plan(_request(home)), seen


def test_a_checkpoint_becomes_a_champion(first: tuple[PlanResult, list[Progress]], home: Path) -> None:
    result, seen = first
    book = open_registry(str(home)).load_plan(result["name"])
    assert (result["version"], result["aliases"], result["sha256"]) == ("1", ["champion"], book.sha256)
    assert [plan.state.instances for plan in book.plans if plan.config] == [1, 2, 3]
    assert book.profile_sha256 == Profile.read(result["profile"]).sha256
    assert PlanBook.from_bytes(Path(result["book"]).read_bytes()) == book
    assert 0 < result["cost_model_error"]["median"] <= result["cost_model_error"]["p90"]
    assert {step.done for step in seen} >= {0, seen[-1].total // 2}


def test_the_run_leaves_artifacts_under_fixed_keys(first: tuple[PlanResult, list[Progress]]) -> None:
    keys = ["plan-frontier", "plan-summary", "plan-version", "profile-progress"]
    with get_client(sync_client=True) as client:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=keys))
        found = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=wanted)}
    assert sorted(found) == keys
    assert "| local-cpu=3 | D" in str(found["plan-summary"].data)
    assert f"models:/{first[0]['name']}/1" in str(found["plan-version"].data)


def test_the_version_says_where_it_comes_from(first: tuple[PlanResult, list[Progress]], home: Path) -> None:
    (version,) = open_registry(str(home)).list_plans(first[0]["name"])
    assert {"flow_run", "hardware_sha256", "policy", "cost_model_error_p90"} <= version.tags.keys()


def test_a_second_run_measures_and_publishes_nothing_again(
    first: tuple[PlanResult, list[Progress]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_flow, "measure", lambda *_, **__: pytest.fail("measured again"))
    assert plan(_request(home)) == first[0]


def test_another_objective_is_searched_on_the_same_profile(
    first: tuple[PlanResult, list[Progress]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_flow, "measure", lambda *_, **__: pytest.fail("measured again"))
    result = plan(_request(home, required_rps=1e6, promote=False))
    assert (result["version"], result["aliases"]) == ("2", [])
    assert result["sha256"] != first[0]["sha256"]
    book = open_registry(str(home)).load_plan(result["name"], "2")
    assert book.objective.required_rps == 1e6
    assert open_registry(str(home)).load_plan(result["name"]).sha256 == first[0]["sha256"]


@pytest.mark.slow
def test_a_journey_is_planned_from_a_trace(
    first: tuple[PlanResult, list[Progress]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_flow, "measure", lambda *_, **__: pytest.fail("measured again"))
    trace = home / "trace.csv"
    trace.write_text("t_ms,instances\n0,4\n60000,3\n120000,4\n180000,2\n240000,4\n")
    request = _request(home, policy="journey", availability=str(trace), required_rps=50.0, promote=False)
    result = plan(request)
    book = PlanBook.from_bytes(Path(result["book"]).read_bytes())
    assert book.policy == "journey"
    # Three instances are lost in 13 instance-minutes, two of them together.
    found = re.search(r"each of 3 instances is lost ([\d.]+) times an hour", book.assumptions)
    assert found
    assert float(found[1]) == pytest.approx(3 / 13 * 60, rel=0.2)
    assert [plan.state.instances for plan in book.plans if plan.config] == [1, 2, 3]
    measured = Profile.read(result["profile"])
    before = search_key(measured, request)
    trace.write_text(trace.read_text() + "300000,3\n")
    assert search_key(measured, request) != before
    with pytest.raises(InvalidInput, match=r"trace .*absent\.csv cannot be read"):
        plan(_request(home, availability=str(home / "absent.csv")))


@pytest.mark.slow
def test_a_deleted_profile_is_measured_again(first: tuple[PlanResult, list[Progress]], home: Path) -> None:
    shutil.rmtree(first[0]["profile"])
    folder = profile_flow.profile(_request(home).measure)
    assert folder == first[0]["profile"]
    assert Profile.read(folder).steps.num_rows > 0


def test_failures_reach_the_caller_as_they_are(home: Path) -> None:
    with pytest.raises(InvalidInput, match="not a directory"):
        plan(_request(home, measure=ProfileRequest(checkpoint=str(home / "absent"), home=str(home))))
    with pytest.raises(InvalidInput, match="a plan needs a profile folder"):
        plan(_request(home, measure=None))
    with pytest.raises(PerennialError, match="run `perennial profile`"):
        plan(_request(home, profile=str(home / "absent")))
