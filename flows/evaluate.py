"""The flow `evaluate`: traces × policies × seeds, simulated in parallel → MLflow and one page."""

# No postponed annotations: Prefect evaluates a flow's parameters where this module's names are unknown.

import json
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, TypedDict

from prefect import flow, task, unmapped
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.context import TaskRunContext
from prefect.futures import as_completed
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from flows.progress import reporter
from flows.study_inputs import EvaluateRequest, study_key, study_of
from flows.study_log import log_study
from flows.study_page import Findings, study_page
from flows.tracking import Tracking, place
from planning.study.results import Result, finite
from planning.study.study import Cell, Study
from profiling.campaign import Progress

PAGE, RESULTS = "study.html", "study.json"


class EvaluateResult(TypedDict):
    """What `evaluate` returns: the page, the results as JSON, MLflow's run, and the means over seeds."""

    page: str
    results: str
    run_id: str
    rows: list[dict[str, Any]]


def evaluate_with(request: EvaluateRequest) -> EvaluateResult:
    """`evaluate` with as many simulations at once as the request says."""
    runner: Any = ThreadPoolTaskRunner(max_workers=request.workers)
    return evaluate.with_options(task_runner=runner)(request)


@flow(name="evaluate")
def evaluate(request: EvaluateRequest) -> EvaluateResult:
    """Simulate every cell of the study, write the page, and log one run for every trace and policy."""
    begun = perf_counter()
    key = study_key(request)
    study = study_of(request, key)
    results = _simulated(study, request, key)
    findings = Findings(study, tuple(results), perf_counter() - begun)
    page = _write(findings, request, Path(request.out or Path(request.home) / "studies" / key[:16]).absolute())
    rows = [finite(asdict(one)) for one in findings.pooled]
    create_table_artifact(key="evaluate-results", table=rows, description="Means over seeds")
    create_link_artifact(key="evaluate-page", link=page.as_uri(), link_text=page.name)
    quoted: Any = quote(findings)  # Prefect need not look for futures in it
    run_id = log_findings(key, str(page.parent), quoted, request)
    return {"page": str(page), "results": str(page.with_name(RESULTS)), "run_id": run_id, "rows": rows}


def _cache_key(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    return "-".join(str(part) for part in ("simulate", parameters["key"], *parameters["cell"]))


@task(name="simulate", cache_key_fn=_cache_key, persist_result=True, result_serializer="json")
def simulate(key: str, cell: list[Any], request: EvaluateRequest) -> dict[str, Any]:
    """One simulation, as JSON; found in the cache if the same was simulated before."""
    return asdict(study_of(request, key).run(Cell(*cell)))


@task(name="log study", retries=2, retry_delay_seconds=1, persist_result=False)
def log_findings(key: str, folder: str, findings: Findings, request: EvaluateRequest) -> str:
    """The study as MLflow runs; returns the id of the one that the others are nested under."""
    params = {name: str(value) for name, value in request.simulated().items()}
    return log_study(Tracking(*place(request.home, request.registry)), findings, key, params, Path(folder))


def _simulated(study: Study, request: EvaluateRequest, key: str) -> list[Result]:
    """Every cell, as many at once as the task runner has workers; in the order of the cells."""
    cells = [list(cell) for cell in study.cells()]
    report = reporter("evaluate-progress")
    report(Progress("", 0, len(cells)))
    futures = simulate.map(unmapped(key), cells, unmapped(request))
    for done, future in enumerate(as_completed(list(futures)), 1):
        future.result()  # raises what the simulation raised
        report(Progress("", done, len(cells)))
    return [Result.from_json(future.result()) for future in futures]


def _write(findings: Findings, request: EvaluateRequest, folder: Path) -> Path:
    """The page and the results beside it; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"request": request.simulated(), "results": [asdict(one) for one in findings.results]}
    (folder / RESULTS).write_text(json.dumps(finite(document), indent=1) + "\n", encoding="utf-8")
    page = folder / PAGE
    page.write_text(study_page(findings), encoding="utf-8")
    return page
