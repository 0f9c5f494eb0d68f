"""`python -m benchmarks.mixing --out DIR`: how many instances to hold, decided by a policy or by a rule.

SpotServe's panels and its whole recording of 10.6 h, with the published arrivals: dollars and latency of the mixing
policy by the price of a second, of the rule that hires what 8 spot instances lack, of all spot instances and no
others, and of on-demand fleets by size. Writes `mixing.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.spot.inputs import MODELS, REFERENCE, TRACES, Inputs, long_arrivals
from planning.mixing import Market, Mixing, solve_mixing
from planning.simulation.serving import Outcome
from planning.study.case import Case
from planning.study.results import Result, finite
from planning.study.systems import on_demand, perennial, perennial_fallback, perennial_mixed, skyserve
from profiling.fingerprint import this_machine

PRICES = (0.0003, 0.001, 0.003, 0.01, 0.015, 0.02, 0.05)
LIMITS_S = {"6.7B": 7.0, "20B": 20.0, "30B": 30.0}  # beyond which a request is late
MISSES = (0.03, 0.3)  # dollars for a late request, where a second of latency is worth little:
_CHEAP = 0.0003
_RULES = {"all spot instances": perennial, "stand-ins for 8": perennial_fallback, "SkyServe-like": skyserve}
_SIZES = (3, 4, 6, 8, 12)
_KEPT = ("mean_s", "p90_s", "p99_s", "usd", "unfinished", "moved_gb")


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; 2 without the reference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixing", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for mixing.json")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    options = parser.parse_args(arguments)
    console = Console()
    if not options.reference.is_dir():
        console.print(f"{options.reference} is not a folder; give the folder of SpotServe's reference cases")
        return 2
    rows = []
    for row in run(Inputs(options.reference)):
        console.print(_table(row))
        rows.append(row)
    options.out.mkdir(parents=True, exist_ok=True)
    written = finite({"machine": this_machine().to_json(), "prices": PRICES, "rows": rows})
    (options.out / "mixing.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0


def run(inputs: Inputs) -> Iterator[dict[str, Any]]:
    """One row for each model and trace."""
    market = Market(inputs.kind.price_spot_usd_h / 3600, inputs.kind.price_on_demand_usd_h / 3600)
    for model in MODELS:
        for most in (12, inputs.full.most):
            book, process = inputs.book(model, most=most, slo_s=LIMITS_S[model]), inputs.process.sized(most)
            mixings = {f"policy at {usd:g}": solve_mixing(book, process, market, usd) for usd in PRICES}
            for usd in MISSES:
                solved = solve_mixing(book, process, market, _CHEAP, miss_usd=usd)
                mixings[f"policy at {_CHEAP:g}, {usd:g} if late"] = solved
            if most == 12:
                for trace in TRACES:
                    yield _row(model, trace, replace(inputs.panel(model, trace), book=book), mixings)
            else:
                times = long_arrivals(inputs.arrival_s[model], inputs.full.duration_s)
                yield _row(model, "whole recording", Case(inputs.models[model], inputs.full, times, book), mixings)


def _row(model: str, trace: str, case: Case, mixings: dict[str, Mixing]) -> dict[str, Any]:
    runs = {name: system(case) for name, system in _RULES.items()}
    least = case.model.fleet.profile.least_devices // case.model.costs.gpus
    runs |= {f"{size} on demand": on_demand(case, size) for size in _SIZES if size >= least}
    runs |= {name: perennial_mixed(replace(case, mixing=one)) for name, one in mixings.items()}
    found = {name: Result.of(trace, name, 0, outcome) for name, outcome in runs.items()}
    return {
        "model": model,
        "trace": trace,
        "limit_s": LIMITS_S[model],
        "systems": {
            name: {key: getattr(one, key) for key in _KEPT} | {"late": _late(runs[name], LIMITS_S[model])}
            for name, one in found.items()
        },
        "cheaper_at_the_rules_p99": _cheaper(found, "p99_s"),
        "cheaper_at_the_rules_mean": _cheaper(found, "mean_s"),
    }


def _late(outcome: Outcome, limit_s: float) -> float:
    """Share of requests that take longer."""
    return float(np.mean(outcome.done_s - outcome.arrival_s > limit_s))


def _cheaper(found: dict[str, Result], key: str) -> float | None:
    """Share of the rule's dollars that the cheapest policy saves which is as quick; None if none is."""
    rule = found["stand-ins for 8"]
    able = [
        one.usd for name, one in found.items() if name.startswith("policy") and getattr(one, key) <= getattr(rule, key)
    ]
    return 1 - min(able) / rule.usd if able else None


def _table(row: dict[str, Any]) -> Table:
    table = Table("", "$", "mean", "P90", "P99", "late", "unfinished", title=f"{row['model']} {row['trace']}")
    for name, one in row["systems"].items():
        times = (f"{one[key]:.2f}" for key in ("mean_s", "p90_s", "p99_s"))
        table.add_row(name, f"{one['usd']:.2f}", *times, f"{one['late']:.1%}", str(one["unfinished"]))
    return table


if __name__ == "__main__":
    sys.exit(main())
