"""SpotServe's re-simulation: what its simulated latencies are checked with, and the inputs that runs of it share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.checks import Document, Folder, Verdict, close
from data.availability import AvailabilityTrace, read_spotserve_cases
from planning.edge_weights import GptShape
from planning.simulation.serving import Outcome
from planning.simulation.serving_spotserve import MOST_BATCH, StaticFleet, simulate_constant, simulate_spotserve
from planning.static_batch import StaticBatchProfile, StaticConfig

AVERAGE_TOLERANCE, P99_TOLERANCE = 0.05, 0.10
ARRIVALS = {"6.7B": "opt6.7b_1.5rps", "20B": "gpt20b_0.35rps", "30B": "llama30b_0.2rps"}
REPLAYED = "maf_replay"  # of the traces that carry required rates
REPLAYED_RPS = 0.6
_ENGINE_START_S = 5.0
_MICRO = 4, 1  # of the published on-demand points

Times = npt.NDArray[np.float64]


def find_input(path: Path, name: str) -> Path:
    """An input file of a folder of cases, or of the published cases beside it."""
    places = (path / name, path.parent / "spotserve" / name)
    return next((place for place in places if place.is_file()), places[0])


def read_fleet(path: Path, entry: Mapping[str, Any], engine_start_s: float = _ENGINE_START_S) -> StaticFleet:
    """The published fleet for one entry of `profiles.json`; hosts in the order of the folder's replay."""
    model = entry["model"]
    shape = GptShape(model["layers"], model["vocab"], model["hidden"], model["max_seq"])
    profile = StaticBatchProfile.from_json(entry)
    return StaticFleet(profile, shape, int(entry["gpus_per_instance"]), engine_start_s, addresses=_addresses(path))


def _addresses(path: Path) -> tuple[int, ...]:
    file = find_input(path, "replay.json")
    return tuple(json.loads(file.read_text(encoding="utf-8"))["tie_order"]) if file.is_file() else ()


def read_traces(path: Path) -> dict[str, AvailabilityTrace]:
    """All traces that come in segments."""
    names = ("traces.json", "traces_extra.json")
    files = [file for file in (find_input(path, name) for name in names) if file.is_file()]
    if not files:
        raise FileNotFoundError(2, "no such file", str(path / names[0]))
    return {name: trace for file in reversed(files) for name, trace in read_spotserve_cases(file).items()}


def check_simulation(document: Document, folder: Folder) -> Iterator[Verdict]:
    """The published system, simulated here, lands where the reference's re-simulation lands."""
    entries = folder.load("profiles.json")["profiles"]
    arrays = np.load(find_input(folder.path, "arrivals.npz"))
    for row in document.get("on_demand", ()):
        yield from _on_demand(row, entries["20B"], folder.path, arrays[ARRIVALS["20B"]])
    traces = read_traces(folder.path) if document.get("spotserve") else {}
    for row in document.get("spotserve", ()):
        entry, trace = entries[row["model"]], traces[row["trace"]]
        changing = any(change.kind == "rate" for change in trace.changes)
        arrival_s = arrays[REPLAYED if changing else ARRIVALS[row["model"]]]
        outcome = simulate_spotserve(
            read_fleet(folder.path, entry),
            trace,
            arrival_s,
            REPLAYED_RPS if changing else entry["required_rps"],
            fill=row["batching"] == "old",
        )
        yield _close(f"{row['model']} {row['trace']} {row['batching']}", outcome, row["avg_s"], row["p99_s"])


def _on_demand(row: Mapping[str, Any], entry: Mapping[str, Any], path: Path, arrival_s: Times) -> Iterator[Verdict]:
    replicas, stages, shards = row["config"]
    config = StaticConfig(replicas, stages, shards, MOST_BATCH, *_MICRO)
    for key, (average_s, p99_s, _) in row["sim"].items():
        mode, start = key.split(",S=")
        fleet = read_fleet(path, entry, float(start))
        outcome = simulate_constant(fleet, config, arrival_s, 1020.0, fill=mode == "old")
        yield _close(f"{row['instances']} on demand {key}", outcome, average_s, p99_s)


def _close(case: str, outcome: Outcome, average_s: float, p99_s: float) -> Verdict:
    """Both within their tolerance; the miss of the one that is not."""
    found = outcome.summary(completed_only=True)
    average = close(case, AVERAGE_TOLERANCE, average_s=(found.mean_s, average_s))
    p99 = close(case, P99_TOLERANCE, p99_s=(found.p99_s, p99_s))
    return max(average, p99, key=lambda verdict: verdict.miss)
