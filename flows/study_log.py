"""A study in MLflow: one run for the study, and nested under it one for every trace and policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import time

from matplotlib.figure import Figure
from mlflow.entities import Metric, Param, RunStatus

from flows.study_figures import latency_over_time
from flows.study_page import Findings, study_figures, trace_panel
from flows.tracking import Tracking
from planning.study.results import Pooled
from planning.study.systems import system

EXPERIMENT = "perennial-studies"
METRICS = ("mean_s", "p50_s", "p90_s", "p99_s", "unfinished", "usd", "moved_gb", "longest_pause_s")

_PARENT = "mlflow.parentRunId"  # the tag by which MLflow nests runs


def log_study(tracking: Tracking, findings: Findings, key: str, params: Mapping[str, str], folder: Path) -> str:
    """Log a study; returns the id of its run. `folder` holds its page. A failure leaves deleted runs."""
    client, experiment = tracking.client, tracking.experiment_id(EXPERIMENT)
    made: list[str] = []

    def begin(name: str, tags: dict[str, str]) -> str:
        made.append(client.create_run(experiment, run_name=name, tags=tags).info.run_id)
        return made[-1]

    try:
        parent = begin(f"{findings.study.model.name} {key[:8]}", {"study": key})
        client.log_batch(parent, params=[Param(name, value) for name, value in sorted(params.items())])
        for name, drawn in study_figures(findings).items():
            client.log_figure(parent, drawn, f"{name}.png")
        client.log_artifacts(parent, str(folder))
        for one in findings.pooled:
            if one.policy in findings.study.policies:
                run_id = begin(f"{one.trace}, {system(one.policy).title}", {_PARENT: parent})
                client.log_batch(run_id, metrics=_metrics(one), params=_params(one))
                client.log_figure(run_id, _own_figure(findings, one), "over_time.png")
    except BaseException:
        for run_id in reversed(made):
            client.delete_run(run_id)
        raise
    for run_id in reversed(made):
        client.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED))
    return parent


def _metrics(one: Pooled) -> list[Metric]:
    now_ms = int(time() * 1000)
    return [Metric(name, float(getattr(one, name)), now_ms, 0) for name in METRICS]


def _params(one: Pooled) -> list[Param]:
    return [Param("trace", one.trace), Param("policy", one.policy), Param("seeds", str(one.seeds))]


def _own_figure(findings: Findings, one: Pooled) -> Figure:
    """Latency over time of this policy alone."""
    panel, title = trace_panel(findings, one.trace), system(one.policy).title
    return latency_over_time([replace(panel, lines={title: panel.lines[title]})])
