"""What the files under `infra/` and the documentation tell people to run, as argument lists."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
Document = dict[str, Any]

_METRIC = re.compile(r"\bperennial_[a-z0-9_]+")


def documents(path: Path) -> list[Document]:
    """The documents of a YAML file."""
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def kubernetes() -> Iterator[tuple[str, Document]]:
    """Every object for Kubernetes, and where it is from."""
    for path in sorted((INFRA / "kubernetes").glob("*.yaml")):
        for document in documents(path):
            yield f"{path.name}: {document['kind']} {document.get('metadata', {}).get('name', '')}", document


def pod_of(document: Document) -> Document | None:
    """The pod that a Deployment, StatefulSet, Job or CronJob makes."""
    spec: Document = document.get("spec", {})
    template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
    return template["spec"] if template else None


def containers() -> dict[str, Document]:
    """Every container for Kubernetes, by name."""
    pods = [pod for _, document in kubernetes() if (pod := pod_of(document))]
    return {container["name"]: container for pod in pods for container in pod["containers"]}


def environment_file(path: Path) -> dict[str, str]:
    """The variables of a systemd environment file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line)


def unit_command(unit: Path, variables: Mapping[str, str]) -> list[str]:
    """What a systemd unit starts, with its variables and specifiers filled in."""
    (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(encoding="utf-8"), re.MULTILINE)
    filled = re.sub(r"\$\{(\w+)\}", lambda match: variables[match[1]], line)
    return shlex.split(filled.replace("%H", "host").replace("%d", "/run/credentials"))


def shell_commands(text: str) -> Iterator[list[str]]:
    """Everything that Markdown's `sh` blocks, or lines of YAML, do with `perennial` or our modules."""
    for line in text.splitlines():
        for part in line.split("#")[0].split(";"):
            words = shlex.split(part)
            if words[:1] == ["perennial"] or words[:2] == ["python", "-m"]:
                yield words


def shell_blocks(path: Path) -> Iterator[str]:
    """The `sh` blocks of a Markdown file, with continued lines joined."""
    for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        yield block.replace("\\\n", " ")


def metric_names(text: str) -> set[str]:
    """The metrics of ours that queries name."""
    return set(_METRIC.findall(text))


def queries() -> Iterator[str]:
    """Every PromQL expression of the dashboard and the alerts."""
    board = json.loads((INFRA / "grafana" / "perennial.json").read_text(encoding="utf-8"))
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (one["expr"] for one in board["annotations"]["list"])
    (alerts,) = documents(INFRA / "prometheus" / "alerts.yaml")
    yield from (rule["expr"] for group in alerts["groups"] for rule in group["rules"])
