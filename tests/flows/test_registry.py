from __future__ import annotations

import sqlite3
from pathlib import Path

import mlflow
import pytest
from pyarrow import parquet

from data.errors import CorruptData, InvalidInput
from data.plan import stated_sha256
from flows.publish import publish
from flows.registry import CHALLENGER, CHAMPION, LAST_GOOD, Registry, Release, plan_name
from flows.summary import FitError
from serving.controller.plans import PlanSource, read_plan_file
from serving.errors import NotFound, PlanMismatch, Unavailable
from tests.data.test_plan import first_version
from tests.flows.books import book, journey, profile, shared

NAME = "plan.tiny-llama.local-4"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh, migrated database: the migration is what costs time."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Registry(f"sqlite:///{path}")
    return path


@pytest.fixture
def registry(database: Path, tmp_path: Path) -> Registry:
    with sqlite3.connect(database) as source, sqlite3.connect(tmp_path / "mlflow.db") as target:
        source.backup(target)
    source.close()
    target.close()
    return Registry(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts")


def _plan_file(registry: Registry, tmp_path: Path) -> Path:
    (path,) = (tmp_path / "artifacts").glob("models/*/artifacts/artifacts/plan.json")
    return path


def test_a_published_book_comes_back_whole(registry: Registry) -> None:
    error = FitError(0.031, 0.12)
    published = publish(registry, Release(book(), profile(), error, {"policy": "latency"}, {"flow": "x"}), CHAMPION)
    assert (published.name, published.version, published.aliases) == (NAME, "1", (CHAMPION,))
    assert registry.load_plan(NAME) == book()
    (version,) = registry.list_plans()
    assert version.sha256 == book().sha256
    assert version.tags["cost_model_error_median"] == "0.0310"
    assert version.tags["flow"] == "x"


def test_the_run_page_shows_curves_parameters_and_figures(registry: Registry) -> None:
    publish(registry, Release(book(), profile(), FitError(0.03, 0.1), {"policy": "latency"}))
    client = mlflow.MlflowClient(registry.uri)
    experiment = client.get_experiment_by_name("perennial-plans")
    (run,) = client.search_runs([experiment.experiment_id])
    latency = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "latency_s")}
    assert latency == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3)}
    prices = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "price_spot_usd_h")}
    assert prices == pytest.approx({0: 0.0, 1: 0.01, 2: 0.02, 3: 0.03})
    assert run.data.params["policy"] == "latency"
    assert run.info.status == "FINISHED"
    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} == {
        "curve.png",
        "frontier.png",
        "steps.png",
    }


def test_the_model_holds_everything_and_answers(registry: Registry, tmp_path: Path) -> None:
    publish(registry, Release(book(), profile()), CHAMPION)
    inside = _plan_file(registry, tmp_path).parent
    assert read_plan_file(inside / "plan.json") == book()
    assert {entry.name for entry in inside.iterdir()} == {
        "plan.json",
        "report.md",
        "frontier.parquet",
        "transitions.parquet",
        "plots",
        "profile",
    }
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@{CHAMPION}")
    three, none = model.predict([{"local-cpu": 5}, {"other": 1}])
    assert three["state"] == "local-cpu=3"
    assert three["config"]["stages"] == 3
    assert none["config"] is None


def test_a_journey_shows_what_follows_what(registry: Registry, tmp_path: Path) -> None:
    publish(registry, Release(journey()), CHAMPION)
    assert registry.load_plan(NAME) == journey()
    inside = _plan_file(registry, tmp_path).parent
    (row,) = parquet.read_table(inside / "transitions.parquet").to_pylist()
    assert (row["state"], row["in_force"], row["config"]) == ("local-cpu=3", "D1·P2·T1·B4", "D1·P2·T1·B4")
    assert row["moved_bytes"] == 0
    assert (inside / "plots" / "transitions.png").stat().st_size > 0
    report = (inside / "report.md").read_text()
    assert "nothing is lost" in report


def test_a_book_of_several_models_is_published_like_any_other(registry: Registry, tmp_path: Path) -> None:
    name = "plan.chat-code.local-2"
    for batch in (2, 4):
        publish(registry, Release(shared(batch), error=FitError(0.03, 0.1)), CHAMPION)
    assert registry.load_plan(name) == shared()
    assert registry.aliases(name) == {CHAMPION: "2", LAST_GOOD: "1"}
    assert [change.state.instances for change in registry.diff(name, "1", "2")] == [1, 2]
    version = registry.list_plans(name)[0]
    assert version.tags["attainment"] == "0.9000"
    assert version.tags["attainment.chat"] == "0.8500"
    assert version.tags["attainment_gap"] == "0.0500"
    assert version.tags["occasion"] == "more is asked of chat"
    history = mlflow.MlflowClient(registry.uri).get_metric_history
    run_id = mlflow.MlflowClient(registry.uri).get_model_version(name, "2").run_id
    assert {metric.step: metric.value for metric in history(run_id, "attainment.code")} == {1: 1.0, 2: 1.0}
    inside = next(path.parent for path in tmp_path.rglob("plan.json") if path.read_bytes() == shared().to_bytes())
    assert [row["model"] for row in parquet.read_table(inside / "groups.parquet").to_pylist()] == ["chat", "code"] * 3
    assert (inside / "plots" / "attainment.png").stat().st_size > 0
    assert "| chat | 2 | 1.5 | 1 | 32 | 16 | told |" in (inside / "report.md").read_text()
    (answer,) = mlflow.pyfunc.load_model(f"models:/{name}@{CHAMPION}").predict([{"local-cpu": 5}])
    assert answer["state"] == "local-cpu=2"
    assert PlanSource(registry.uri, name).poll() == (shared(), "2")
    registry.rollback(name)
    assert registry.load_plan(name) == shared(2)


def test_a_book_of_the_first_version_is_still_served(registry: Registry, tmp_path: Path) -> None:
    """Its checksum in the registry is that of the document that was registered."""
    publish(registry, Release(book()), CHAMPION)
    content = first_version(book())
    _plan_file(registry, tmp_path).write_bytes(content)
    with pytest.raises(PlanMismatch, match="another book"):
        registry.load_plan(NAME)
    mlflow.MlflowClient(registry.uri).set_model_version_tag(NAME, "1", "plan_sha256", stated_sha256(content))
    assert registry.load_plan(NAME) == book()


def test_promote_remembers_the_previous_champion_and_rollback_returns_to_it(registry: Registry) -> None:
    for batch in (1, 2):
        publish(registry, Release(book(batch)), CHAMPION)
    assert registry.aliases(NAME) == {CHAMPION: "2", LAST_GOOD: "1"}
    assert registry.rollback(NAME) == "1"
    assert registry.aliases(NAME) == {CHAMPION: "1", LAST_GOOD: "2"}
    assert registry.promote(NAME, "2", CHALLENGER) == "2"
    assert registry.promote(NAME, CHALLENGER) == "2"
    assert registry.aliases(NAME) == {CHAMPION: "2", CHALLENGER: "2", LAST_GOOD: "1"}
    registry.promote(NAME, "2")
    assert registry.aliases(NAME)[LAST_GOOD] == "1"
    assert [change.state.instances for change in registry.diff(NAME, "1", "2")] == [1, 2, 3]


@pytest.mark.parametrize("step", ["_log_model", "register", "promote", "set_aliases"])
def test_a_failure_half_way_leaves_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    publish(registry, Release(book(1)), CHAMPION)
    real, calls = getattr(Registry, step), []

    def fail_once_after(self: Registry, *args: object) -> object:
        calls.append(step)
        result = real(self, *args)
        if len(calls) == 1:
            raise OSError("no space left on device")
        return result

    monkeypatch.setattr(Registry, step, fail_once_after)
    with pytest.raises(OSError, match="no space"):
        publish(registry, Release(book(2)), CHAMPION)
    assert registry.aliases(NAME) == {CHAMPION: "1"}
    assert registry.load_plan(NAME) == book(1)
    assert [version.version for version in registry.list_plans()] == ["1"]


def test_a_failed_first_publication_leaves_no_plan_at_all(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Registry, "promote", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        publish(registry, Release(book()), CHAMPION)
    assert registry.list_plans() == []
    with pytest.raises(NotFound):
        registry.aliases(NAME)


def test_only_plan_json_is_read(registry: Registry, tmp_path: Path) -> None:
    publish(registry, Release(book()), CHAMPION)
    path = _plan_file(registry, tmp_path)
    model_folder = path.parent.parent
    (model_folder / "plan_model.py").write_text("raise SystemExit('executed')")
    (model_folder / "MLmodel").unlink()
    assert registry.load_plan(NAME) == book()


def test_a_changed_book_is_refused(registry: Registry, tmp_path: Path) -> None:
    publish(registry, Release(book()), CHAMPION)
    path = _plan_file(registry, tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"max_batch":4', b'"max_batch":9'))
    with pytest.raises(CorruptData, match=r"plan\.tiny-llama\.local-4 version 1.*checksum"):
        registry.load_plan(NAME)
    path.write_bytes(book(8).to_bytes())
    with pytest.raises(PlanMismatch, match="another book"):
        registry.load_plan(NAME)
    path.unlink()
    with pytest.raises(Unavailable, match="cannot be fetched"):
        registry.load_plan(NAME)


def test_unknown_names_and_aliases_are_explained(registry: Registry) -> None:
    publish(registry, Release(book()), CHAMPION)
    with pytest.raises(NotFound, match=r"no plan plan\.tiny-llama\.local-4@9"):
        registry.load_plan(NAME, "9")
    with pytest.raises(NotFound, match=r"no plan plan\.other@champion"):
        registry.load_plan("plan.other")
    with pytest.raises(InvalidInput, match="use one of champion"):
        registry.promote(NAME, "1", "best")
    with pytest.raises(NotFound, match="no earlier champion"):
        registry.rollback(NAME)


def test_a_source_reports_each_move_of_the_alias_once(registry: Registry, tmp_path: Path) -> None:
    publish(registry, Release(book(1)), CHAMPION)
    source = PlanSource(registry.uri, NAME)
    assert source.poll() == (book(1), "1")
    assert source.poll() is None
    publish(registry, Release(book(2)))
    assert source.poll() is None
    registry.promote(NAME, "2")
    assert source.poll() == (book(2), "2")
    registry.rollback(NAME)
    assert source.poll() == (book(1), "1")


def test_a_damaged_version_is_reported_once_then_left_alone(registry: Registry, tmp_path: Path) -> None:
    publish(registry, Release(book()), CHAMPION)
    _plan_file(registry, tmp_path).write_bytes(b"{")
    source = PlanSource(registry.uri, NAME)
    with pytest.raises(CorruptData):
        source.poll()
    assert source.poll() is None


def test_names_are_safe_for_the_registry() -> None:
    assert plan_name("meta-llama/Llama-3 8B", "h200x4-spot") == "plan.meta-llama-llama-3-8b.h200x4-spot"
    assert plan_name("//", "a:b") == "plan.unnamed.a-b"
