"""The files under `infra/` fit what they are about: the command line, the metrics, and each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from typer.core import TyperGroup
from typer.main import get_command

from perennial.cli import app
from serving.telemetry import Metrics
from tests.infra.manifests import (
    INFRA,
    ROOT,
    containers,
    documents,
    environment_file,
    kubernetes,
    metric_names,
    pod_of,
    queries,
    shell_blocks,
    shell_commands,
    unit_command,
)

KUBERNETES = "1.34.0"
DOCUMENTS = sorted([ROOT / "README.md", INFRA / "README.md", *(ROOT / "docs").glob("*.md")])


def understood(words: Sequence[str]) -> dict[str, Any]:
    """The parameters of a command as the command line reads it; nothing is run. Raises its error."""
    command: Any = get_command(app)
    context = command.make_context("perennial", list(words))
    while isinstance(command, TyperGroup):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    parameters: dict[str, Any] = context.params
    return parameters


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_that_are_shown_are_understood(path: Path) -> None:
    for block in shell_blocks(path):
        for words in shell_commands(block):
            if words[0] == "perennial":
                understood([word for word in words[1:] if word != "…"])
            else:
                assert find_spec(words[2]) is not None, words


def test_a_command_that_is_not_understood_is_noticed() -> None:
    with pytest.raises(Exception, match="--bogus"):
        understood(["serve", "--checkpoint", "x", "--bogus"])


@pytest.mark.parametrize(("what", "document"), [pytest.param(*one, id=one[0]) for one in kubernetes()])
def test_objects_are_of_kubernetes(what: str, document: dict[str, object]) -> None:
    if document["kind"] != "Kustomization":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_every_file_is_applied() -> None:
    (kustomization,) = documents(INFRA / "kubernetes" / "kustomization.yaml")
    there = {path.name for path in (INFRA / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == there


def test_containers_start_what_exists() -> None:
    ours = {name: one["args"] for name, one in containers().items() if "args" in one}
    assert {arguments[0] for arguments in ours.values()} == {"serve", "agent", "profile", "plan"}
    for arguments in ours.values():
        understood(arguments)


def test_objects_fit_each_other() -> None:
    """Services select pods, named ports exist, and agents have less time than Kubernetes gives them."""
    found = [document for _, document in kubernetes()]
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in found if "template" in one.get("spec", {})]
    pods = [pod for one in found if (pod := pod_of(one))]
    ports = {port["name"] for pod in pods for one in pod["containers"] for port in one.get("ports", ())}
    for service in (one for one in found if one["kind"] == "Service"):
        assert service["spec"]["selector"] in labels
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    agent = next(pod for pod in pods if pod["containers"][0]["name"] == "agent")
    told = understood(agent["containers"][0]["args"])
    assert told["grace_s"] < agent["terminationGracePeriodSeconds"]
    assert told["controller"] == "perennial-control:50052"
    controller = understood(containers()["controller"]["args"])
    assert [controller[name] for name in ("port", "control_port", "metrics_port")] == [50051, 50052, 9090]


@pytest.mark.parametrize(("unit", "variables"), [("perennial", "serve"), ("perennial-agent", "agent")])
def test_units_start_what_exists(unit: str, variables: str) -> None:
    folder = INFRA / "systemd"
    text = (folder / f"{unit}.service").read_text(encoding="utf-8")
    words = unit_command(folder / f"{unit}.service", environment_file(folder / f"{variables}.env"))
    told = understood(words[1:])
    (stop_s,) = map(float, re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE))
    assert told.get("grace_s", 30.0) < stop_s


def test_machines_of_ray_start_what_exists() -> None:
    (cluster,) = documents(INFRA / "ray" / "cluster.yaml")
    for key, command in (("head_start_ray_commands", "serve"), ("worker_start_ray_commands", "agent")):
        (line,) = (line for line in cluster[key] if "bin/perennial" in line)
        words = re.sub(r"\$\([^)]*\)", "10.0.0.1", line.split("bin/perennial ", 1)[1]).split()
        assert words[0] == command
        understood(words)


def test_queries_are_promql_about_metrics_that_exist() -> None:
    metrics = Metrics()
    metrics.fleet(1, ["ready"])
    metrics.plan(version="1", sha256="0", source="file", config="D1")
    text = generate_latest(metrics.registry).decode()
    families = [one for one in text_string_to_metric_families(text) if not one.name.endswith("_created")]
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    known = {family.name + suffix for family in families for suffix in suffixes[family.type]}
    named = set()
    for query in queries():
        promql_parser.parse(query.replace("$__rate_interval", "1m"))
        named |= metric_names(query)
    assert named <= known
    assert {name.removesuffix("_bucket").removesuffix("_total") for name in named} == {one.name for one in families}
