"""Several checkpoints on a command line, and the groups that they are told to share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.cluster import ClusterState
from data.deployment import Deployment, Hosted, SharedGroup
from data.errors import InvalidInput
from perennial.models import checkpoint_fields, read_groups
from serving.engine.checkpoint import create_checkpoint

TOLD: dict[str, Any] = {
    "instances": {
        "1": [{"models": ["a", "b"]}],
        "3": [{"models": ["a"]}, {"stages": 2, "models": [{"model": "b", "max_batch": 4, "partition": [1, 1]}]}],
    }
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for name in ("a", "b=2"):
        create_checkpoint(str(path / name), family="llama", layers=2, hidden=32, ffn=64)
    return path


def told(home: Path, content: object) -> Path:
    path = home / "groups.json"
    path.write_text(json.dumps(content) if not isinstance(content, str) else content)
    return path


def test_one_folder_needs_no_name_and_several_do(home: Path) -> None:
    a, b = str(home / "a"), str(home / "b=2")
    assert checkpoint_fields([a]) == {"checkpoint": a}
    assert checkpoint_fields([b]) == {"checkpoint": b}, "a folder may have an equals sign in its name"
    assert checkpoint_fields([f"x={a}"]) == {"checkpoints": {"x": a}}
    assert checkpoint_fields([f"org/x={a}", f"y={b}"]) == {"checkpoints": {"org/x": a, "y": b}}
    for values in ([a, b], [f"x={a}", f"x={b}"], [f"x={a}", b]):
        with pytest.raises(InvalidInput, match="need a name each"):
            checkpoint_fields(values)
    with pytest.raises(InvalidInput, match="is not a checkpoint"):
        checkpoint_fields([f"x={home}"])


def test_what_is_not_told_is_shared_equally(home: Path) -> None:
    book = read_groups(told(home, TOLD), {"a": str(home / "a"), "b": str(home / "b=2")})
    chosen = {plan.state: plan.deployment for plan in book.plans}
    pair = SharedGroup(1, 1, (Hosted("a", 8, 0.5), Hosted("b", 8, 0.5)))
    line = SharedGroup(2, 1, (Hosted("b", 4, 1.0, (1, 1)),))
    assert list(chosen.values()) == [Deployment((pair,)), Deployment((SharedGroup(1, 1, (Hosted("a", 8),)), line))]
    assert book.plan_for(ClusterState.of({"local-cpu": 2})).deployment == Deployment((pair,))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "does not describe groups"),
        ({}, "does not describe groups"),
        ({"instances": {}}, "no number of instances"),
        ({"instances": {"one": []}}, "does not describe groups"),
        ({"instances": {"1": [{"models": ["c"]}]}}, "'c', which is none of the models a, b"),
        ({"instances": {"1": [{"models": []}]}}, "at least one model"),
        ({"instances": {"1": [{"models": ["a"], "speed": 1}]}}, "unknown field speed"),
        ({"instances": {"1": [{"shards": 2, "models": ["a"]}]}}, "takes 2 devices of 1"),
    ],
)
def test_what_makes_no_sense_is_said(home: Path, content: object, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        read_groups(told(home, content), {"a": str(home / "a"), "b": str(home / "b=2")})
