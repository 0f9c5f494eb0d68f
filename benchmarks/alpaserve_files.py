"""Reading AlpaServe's planning cases (schema 2): a JSON document with an NPZ file of arrivals beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InvalidInput
from data.placement import Arrivals, HostedModel, Schedule, Shape, SharedFleet, StageProfile

Document = Mapping[str, Any]
SCHEMA = 2


@dataclass(frozen=True)
class PlanningCase:
    """One problem: the fleet, the trace to plan with, the traces to judge with, and what others made of it."""

    name: str
    fleet: SharedFleet
    train: Arrivals
    heldout: tuple[Arrivals, ...]
    recorded: Mapping[str, Any]
    document: Document

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes that recorded placements use, profiled or not."""
        plans = [plan for entry in self.recorded.values() for _, plan, _, _ in recorded_plans(self, entry)]
        groups = [group for plan in plans for placement in plan.placements for group in placement.groups]
        return tuple(sorted({group.shape for group in groups}))


def read_case(document: Document, folder: Path) -> PlanningCase:
    """The case of a document that lies in `folder`. Raises `InvalidInput` for another schema."""
    if document.get("schema") != SCHEMA:
        raise InvalidInput(f"planning cases of schema {document.get('schema')!r} cannot be read; write schema {SCHEMA}")
    with np.load(folder / document["workload"]["npz"]) as arrays:
        traces = {
            name.removesuffix("_arrivals"): Arrivals.of(arrays[name], arrays[name.replace("arrivals", "model_ids")])
            for name in sorted(arrays.files)
            if name.endswith("_arrivals")
        }
    heldout = tuple(trace for name, trace in traces.items() if name.startswith("heldout"))
    return PlanningCase(
        document["case_id"], _fleet(document), traces["train"], heldout, document.get("results", {}), document
    )


def recorded_plans(case: PlanningCase, entry: Document) -> Iterator[tuple[str, Schedule, Arrivals, Document]]:
    """Every placement of a policy's entry with the trace and the figures recorded for it.

    A schedule that was re-planned on every trace has its placements in `placement_heldout`.
    """
    if "placement" not in entry:
        return
    yield "train", Schedule.from_json(entry["placement"]), case.train, entry["train"]
    for number, (trace, figures) in enumerate(zip(case.heldout, entry.get("heldout", ()), strict=False)):
        if "placement_heldout" in entry:
            yield f"heldout{number}", Schedule.from_json(entry["placement_heldout"][number]), trace, figures
        elif "segments" not in entry["placement"]:
            yield f"heldout{number}", Schedule.from_json(entry["placement"]), trace, figures


def is_planning_case(document: Document) -> bool:
    """Whether a JSON document is one of these cases."""
    return {"cluster", "models", "profile", "workload"} <= set(document)


def _fleet(document: Document) -> SharedFleet:
    cluster = document["cluster"]
    return SharedFleet(
        devices=int(cluster["num_devices"]),
        budget_bytes=float(cluster["mem_budget_bytes"]),
        devices_per_node=int(cluster.get("num_devices_per_node", 8)),
        models=tuple(
            HostedModel(one["name"], one["type"], float(one["slo_s"]), float(one["rate"]), float(one["cv"]))
            for one in document["models"]
        ),
        profiles={kind: dict(_profiles(entry["configs"])) for kind, entry in document["profile"].items()},
    )


def _profiles(configs: Document) -> Iterator[tuple[Shape, StageProfile]]:
    for key, config in configs.items():
        copies, shards, stages = (int(degree) for degree in key.split(","))
        if copies == 1:
            yield Shape(shards, stages), StageProfile(tuple(config["latency"]["1"]), tuple(config["weight_mem"]))
