from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow

from data.cluster import ClusterSpec
from data.errors import InvalidInput
from flows.local import serve_plan
from flows.plan import PlanRequest
from flows.profile import ProfileRequest

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
REQUESTS = {"plan": PlanRequest, "profile": ProfileRequest}


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_a_deployment_names_a_flow_and_fills_its_parameters(deployment: dict[str, Any]) -> None:
    path, _, name = deployment["entrypoint"].partition(":")
    flow = getattr(import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert isinstance(flow, Flow)
    assert flow.name == deployment["name"]
    request = REQUESTS[name].model_validate(deployment["parameters"]["request"])
    assert request.model_fields_set == set(deployment["parameters"]["request"])
    if isinstance(request, PlanRequest):
        assert len(ClusterSpec.from_json(request.cluster).states()) == 5


def test_plan_is_scheduled() -> None:
    (plan,) = (deployment for deployment in DEPLOYMENTS if deployment["name"] == "plan")
    assert plan["schedules"][0]["cron"]


def test_a_schedule_is_one_of_two() -> None:
    request = PlanRequest(cluster={})
    for schedule in ({}, {"cron": "0 4 * * *", "every_s": 60.0}):
        with pytest.raises(InvalidInput, match="either a cron expression or a number of seconds"):
            serve_plan(request, **schedule)
