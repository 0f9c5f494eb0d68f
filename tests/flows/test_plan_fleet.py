from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import Infeasible, InvalidInput, PerennialError
from data.shared_plan import SharedPlanBook
from flows.fleet_file import FleetFile
from flows.fleet_steps import FleetRequest, FleetResult
from flows.plan import PlanRequest, plan
from flows.registry import CHALLENGER, CHAMPION, open_registry
from serving.engine.checkpoint import create_checkpoint
from tests.flows.books import grid

pytestmark = [pytest.mark.usefixtures("prefect"), pytest.mark.slow]

ASKED = {"slo_s": 30.0, "input_tokens": 24, "output_tokens": 16}
MODELS: dict[str, dict[str, Any]] = {
    "chat": {"profile": "measured", "rate_rps": 1.0, **ASKED},
    "code": {"profile": "measured", "rate_rps": 0.5, **ASKED},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    grid().write(home / "measured")
    return home


def _file(home: Path, **changes: object) -> str:
    path = home / "fleet.json"
    cluster = {"type": "local-cpu", "instances": 2}
    path.write_text(json.dumps({"cluster": cluster, "models": MODELS, **changes}))
    return str(path)


def _request(home: Path, changes: dict[str, object] | None = None, **fields: object) -> FleetRequest:
    """A request whose fleet file has `changes`."""
    return FleetRequest(**{"fleet": _file(home, **(changes or {})), "home": str(home), "budget_s": 0.2, **fields})


def _trace(path: Path, seed: int, **rates_rps: float) -> str:
    generator = np.random.default_rng(seed)
    rows = ["arrival_s,model,input_tokens,output_tokens"]
    for model, rate_rps in rates_rps.items():
        times_s = np.cumsum(generator.exponential(1 / rate_rps, int(600 * rate_rps)))
        rows += [f"{at_s:.3f},{model},{generator.integers(16, 33)},16" for at_s in times_s]
    path.write_text("\n".join(rows))
    return str(path)


@pytest.fixture(scope="module")
def first(prefect: str, home: Path) -> FleetResult:
    result = plan(_request(home))
    assert "profiles" in result
    return result


def test_a_fleet_file_becomes_a_champion(first: FleetResult, home: Path) -> None:
    assert (first["name"], first["version"], first["aliases"]) == ("plan.chat-code.local-cpu-2", "1", [CHAMPION])
    book = open_registry(str(home)).load_plan(first["name"])
    assert isinstance(book, SharedPlanBook)
    assert SharedPlanBook.from_bytes(Path(first["book"]).read_bytes()) == book
    assert [plan.state.instances for plan in book.plans if plan.deployment] == [1, 2]
    assert all(plan.deployment is None or plan.deployment.models == ("chat", "code") for plan in book.plans)
    assert {one.model for one in book.speeds} == {"chat", "code"}
    (version,) = open_registry(str(home)).list_plans(first["name"])
    assert {
        "attainment",
        "attainment_bound",
        "attainment.chat",
        "flow_run",
        "cost_model_error_p90",
    } <= version.tags.keys()


def test_a_second_run_searches_and_publishes_nothing_again(first: FleetResult, home: Path) -> None:
    assert plan(_request(home)) == first


def test_a_history_says_what_is_asked_for(first: FleetResult, home: Path) -> None:
    _trace(home / "history.csv", 0, chat=2.0, code=0.5)
    result = plan(_request(home, {"history": "history.csv"}, promote=False))
    assert result["aliases"] == []
    book = SharedPlanBook.from_bytes(Path(result["book"]).read_bytes())
    assert book.demands[0].rate_rps == pytest.approx(2.0, rel=0.2)
    assert (book.demands[0].requests, book.demands[0].slo_s, book.demands[1].output_tokens) == (1200, 30.0, 16)


def test_requests_as_assumed_change_nothing_and_drifted_ones_propose_a_challenger(
    first: FleetResult, home: Path
) -> None:
    registry = open_registry(str(home))
    before = len(registry.list_plans(first["name"]))
    same = plan(_request(home, recent=_trace(home / "same.csv", 1, chat=1.0, code=0.5)))
    assert (same["version"], same["drift"], same["book"]) == ("1", [], "")
    assert len(registry.list_plans(first["name"])) == before

    drifted = plan(_request(home, recent=_trace(home / "more.csv", 2, chat=1.0, code=5.0)))
    assert drifted["aliases"] == [CHALLENGER]
    assert registry.aliases(first["name"])[CHAMPION] == "1"
    assert drifted["drift"][0].startswith("requests/s of code: 0.5 assumed, ")
    book = registry.load_plan(first["name"], CHALLENGER)
    assert book.occasion.startswith("Recent requests are not those that version 1 counts on: requests/s of code")
    assert "on them its groups have" in book.occasion
    assert book.demands[1].rate_rps == pytest.approx(5.0, rel=0.2)

    again = plan(_request(home, recent=_trace(home / "still.csv", 3, chat=1.0, code=5.0)))
    assert (again["version"], again["aliases"], again["book"]) == (drifted["version"], [CHALLENGER], "")
    assert again["drift"][0].startswith("requests/s of code: 0.5 assumed, ")


def test_a_scheduled_run_knows_what_to_plan(home: Path) -> None:
    """Prefect hands parameters over as JSON."""
    for request in (_request(home), PlanRequest(cluster={})):
        (found,) = plan.validate_parameters({"request": request.model_dump(mode="json")}).values()
        assert found == request


def test_what_cannot_be_compared_is_said(first: FleetResult, home: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no file"):
        plan(_request(home, recent=str(home / "absent.csv")))
    (home / "short.csv").write_text("arrival_s,model,input_tokens,output_tokens\n0,chat,1,1\n5,code,1,1\n")
    with pytest.raises(InvalidInput, match="holds 5 s of requests, too few"):
        plan(_request(home, recent=str(home / "short.csv")))
    models = {"chat": MODELS["chat"], "other": MODELS["code"]}
    with pytest.raises(PerennialError, match=r"no plan plan\.chat-other"):
        plan(_request(home, {"models": models}, recent=str(home / "short.csv")))


def test_every_model_that_cannot_be_served_is_named_in_one_error(first: FleetResult, home: Path) -> None:
    models = {name: {**model, "slo_s": 0.001} for name, model in MODELS.items()}
    with pytest.raises(Infeasible, match=r"chat takes .* its SLO is 0\.001 s.*; code takes .* its SLO is"):
        plan(_request(home, {"models": models}))


@pytest.mark.slow
def test_checkpoints_are_measured(home: Path) -> None:
    sizes = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 1, "ffn": 64, "vocab": 300}
    create_checkpoint(str(home / "tiny"), family="llama", **sizes)
    models = {"tiny": {**ASKED, "checkpoint": "tiny", "rate_rps": 1.0}, "chat": MODELS["chat"]}
    result = plan(_request(home, {"models": models}, measure_s=1.0, max_shards=1))
    assert (result["name"], result["aliases"]) == ("plan.chat-tiny.local-cpu-2", [CHAMPION])
    assert Path(result["profiles"]["tiny"]).is_dir()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"models": {}}, "models: "),
        ({"models": {"a": {"slo_s": 1.0}}}, "a needs either a checkpoint to measure or the folder of a profile"),
        ({"models": {"a": {"checkpoint": "a"}}}, r"models\.a\.slo_s: Field required"),
        ({"model": {}}, "model: Extra inputs are not permitted"),
    ],
)
def test_a_fleet_file_that_makes_no_sense_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        FleetFile.read(_file(tmp_path, **changes))


def test_a_cluster_is_of_the_catalog_or_whole(tmp_path: Path) -> None:
    short = FleetFile.read(_file(tmp_path, cluster={"type": "local-cpu", "instances": 3, "memory_mb": 64})).spec()
    assert (short.name, short.most, short.types[0].memory_bytes) == ("local-cpu-3", (3,), 64_000_000)
    assert FleetFile.read(_file(tmp_path, cluster=short.to_json())).spec() == short
    with pytest.raises(InvalidInput, match="cluster takes type, instances"):
        FleetFile.read(_file(tmp_path, cluster={"kind": "x"})).spec()
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"bad\.json: the whole: Invalid JSON"):
        FleetFile.read(tmp_path / "bad.json")
