"""Running the flows on one machine: everything they leave behind is under one home folder.

Importing this module is cheap; Prefect is imported when a flow is run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from data.errors import InvalidInput

if TYPE_CHECKING:
    from flows.evaluate import EvaluateResult
    from flows.fleet_steps import FleetRequest, FleetResult
    from flows.plan import PlanRequest, PlanResult
    from flows.profile import ProfileRequest
    from flows.progress import Listener
    from flows.study_inputs import EvaluateRequest


def run_profile(request: ProfileRequest, *, on_progress: Listener | None = None) -> str:
    """Run the flow `profile`; returns the folder of the profile."""
    with _prefect(request.home):
        from flows.profile import profile
        from flows.progress import listening

        with listening(on_progress):
            return profile(request)


def run_plan(request: PlanRequest, *, on_progress: Listener | None = None) -> PlanResult:
    """Run the flow `plan` for one model; returns what was published."""
    return cast("PlanResult", _run_plan(request, on_progress))


def run_plan_fleet(request: FleetRequest, *, on_progress: Listener | None = None) -> FleetResult:
    """Run the flow `plan` for several models; returns what was published."""
    return cast("FleetResult", _run_plan(request, on_progress))


def _run_plan(request: PlanRequest | FleetRequest, on_progress: Listener | None) -> PlanResult | FleetResult:
    with _prefect(request.home):
        from flows.plan import plan
        from flows.progress import listening

        with listening(on_progress):
            return plan(request)


def run_evaluate(request: EvaluateRequest, *, on_progress: Listener | None = None) -> EvaluateResult:
    """Run the flow `evaluate`; returns where its page is, and its numbers."""
    with _prefect(request.home):
        from flows.evaluate import evaluate_with
        from flows.progress import listening

        with listening(on_progress):
            return evaluate_with(request)


def serve_plan(request: PlanRequest | FleetRequest, *, cron: str = "", every_s: float = 0.0) -> None:
    """Run the flow `plan` on a schedule until interrupted. Raises `InvalidInput` without one."""
    if bool(cron) == (every_s > 0):
        raise InvalidInput("a schedule is either a cron expression or a number of seconds")
    with _prefect(request.home, schedules=True):
        from prefect.flows import EntrypointType

        from flows.plan import plan

        plan.serve(
            name="plan",
            cron=cron or None,
            interval=every_s or None,
            parameters={"request": request.model_dump(mode="json")},
            entrypoint_type=EntrypointType.MODULE_PATH,
            print_starting_message=False,
        )


@contextmanager
def _prefect(home: str, *, schedules: bool = False) -> Iterator[None]:
    folder = Path(home).absolute() / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    # Prefect makes a folder in the user's home on import unless it is told another.
    os.environ.setdefault("PREFECT_HOME", str(folder))
    from flows.prefect_api import prefect_api

    with prefect_api(folder, schedules=schedules, log_level=logging.INFO if schedules else logging.CRITICAL):
        yield
