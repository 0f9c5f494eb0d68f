"""How long plan books take to make, to read and to ask: three models on fleets of 4-GPU instances.

`python -m benchmarks.books --out DIR`. Step times are a roofline of T4s, not measured: what is timed here is the
planning alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from math import log2
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from data.catalog import instance_type, model_shape
from data.cluster import ClusterSpec, ClusterState
from data.layout import ParallelConfig
from data.plan import Objective, PlanBook
from planning.book import Policy, build_book
from planning.costs import CostModel, LinkCost
from planning.regression import Curve
from profiling.fingerprint import this_machine

RATES_RPS = {"opt-6.7b": 1.5, "gpt-20b": 0.35, "llama-30b": 0.2}  # as in SpotServe's evaluation
POLICIES: tuple[Policy, ...] = ("journey", "perennial")
BARS_S = {12: 60.0, 256: 600.0}  # for the three models together
LOOKUP_BAR_MS = 1.0
_TYPE = "g4dn.12xlarge"
_MEMORY_BYTES_PER_S, _FLOPS_PER_S = 320e9 * 0.7, 65e12 * 0.4  # of one T4, as far as kernels get
_ALL_REDUCE_MS = 0.05  # of one layer, for every doubling of the shards
_TRIES = 5


def main() -> int:
    """Measure, print, write; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for most in BARS_S:
        for policy in POLICIES:
            for name in RATES_RPS:
                rows.append(measure(name, most, policy))
                print(json.dumps(rows[-1]), flush=True)
    found = bars(rows)
    result = {"fingerprint": asdict(this_machine()), "rows": rows, "bars": found}
    print(json.dumps(found, indent=1))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "books.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(bar["met"] for bar in found) else 1


def measure(name: str, most: int, policy: Policy) -> dict[str, Any]:
    """One book: made, written, read, and asked in every state with many layouts in force."""
    fleet = ClusterSpec(f"{_TYPE}-{most}", (instance_type(_TYPE),), (most,))
    begun = time.perf_counter()
    costs, objective = roofline(name), Objective(RATES_RPS[name], 512, 128)
    book = build_book(costs.spec, fleet, costs, objective, policy)
    made_s = time.perf_counter() - begun
    content = book.to_bytes()
    begun = time.perf_counter()
    book = PlanBook.from_bytes(content)
    read_s = time.perf_counter() - begun
    lookups = _lookups_ms(book, most)
    return {
        "model": name,
        "instances": most,
        "policy": policy,
        "made_s": made_s,
        "book_bytes": len(content),
        "read_s": read_s,
        "layouts": len({move.now for move in book.moves}),
        "transitions": sum(len(plan.transitions) for plan in book.plans),
        "lookup_ms": {"median": median(lookups), "slowest": max(lookups)},
    }


def roofline(name: str) -> CostModel:
    """Weights are read once a step, products are computed, shards add up what they have over the network."""
    spec = model_shape(name)
    layer_bytes = spec.weight_bytes / spec.layers

    def curve(shards: int) -> Curve:
        layer_ms = 1e3 * layer_bytes / shards / _MEMORY_BYTES_PER_S + _ALL_REDUCE_MS * log2(shards)
        row_ms = 1e3 * 2 * layer_bytes / spec.dtype_bytes / shards / _FLOPS_PER_S
        return Curve(np.array([0.1, layer_ms, 1e-4, row_ms, 1e-8]))

    curves = {(phase, "layers", shards): curve(shards) for phase in ("prefill", "decode") for shards in (1, 2, 4, 8)}
    network = LinkCost(1e-4, 1 / instance_type(_TYPE).network_bytes_per_s)
    return CostModel(spec, curves, {"network": network}, kv_element_bytes=2)


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of the three books of each policy and size, and the slowest lookup."""
    found = [
        _bar(f"three {policy} books for {most} instances, s", limit_s, _made_s(rows, policy, most))
        for most, limit_s in BARS_S.items()
        for policy in POLICIES
    ]
    return [*found, _bar("slowest lookup, ms", LOOKUP_BAR_MS, max(row["lookup_ms"]["slowest"] for row in rows))]


def _bar(what: str, at_most: float, value: float) -> dict[str, Any]:
    return {"what": what, "at_most": at_most, "value": value, "met": value <= at_most}


def _made_s(rows: list[dict[str, Any]], policy: Policy, most: int) -> float:
    return sum(float(row["made_s"]) for row in rows if row["policy"] == policy and row["instances"] == most)


def _lookups_ms(book: PlanBook, most: int) -> list[float]:
    """Of each question the median of a few tries: what else the machine does meanwhile is not the book's."""
    layouts: list[ParallelConfig | None] = [None, *list(dict.fromkeys(move.now for move in book.moves))[::8]]
    found = []
    for count in range(1, most + 1, max(most // 32, 1)):
        state = ClusterState.of({_TYPE: count})
        for now in layouts:
            tries = []
            for _ in range(_TRIES):
                begun = time.perf_counter()
                book.plan_for(state, now)
                tries.append(1e3 * (time.perf_counter() - begun))
            found.append(median(tries))
    return found


if __name__ == "__main__":
    sys.exit(main())
