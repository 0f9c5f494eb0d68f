"""`python -m benchmarks.availability --out DIR`: how well availability processes describe recorded fleets.

SpotServe's recording (g4dn, 10.6 h), Parcae's (p3, 11.4 h) and SkyPilot's zones of 16 and 4 instances (two weeks each).
For each: processes with one and two regimes, by Akaike's criterion and by the likelihood of the last third under
a process fitted to the rest; Kolmogorov-Smirnov and rank-correlation tests of their residuals; and, for the process
chosen where these do not reject it, a parametric bootstrap, for parameters that were fitted to the data make a test too
lenient. For zones that were recorded together: what sharing regimes explains, and losses at the same time. Writes
`availability.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import kstest, spearmanr

from benchmarks.spot.inputs import started
from data.availability import (
    AvailabilityTrace,
    Change,
    joined,
    read_availability,
    read_spotserve_cases,
)
from planning.availability import Process, generate
from planning.availability_fit import fit, log_likelihood, residuals
from profiling.fingerprint import this_machine

SHARED = Path(__file__).resolve().parents[2] / "shared"
REGIMES = (1, 2)
_SEEDS = 9  # draws within ticks, of which the median is shown
_FITTED = 2 / 3  # of a trace; the rest is held out
_REJECTED = 0.01
_SKYPILOT = {"4-node": "preemption", "16-node": "availability"}


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; 2 without the traces."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.availability", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for availability.json")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with data/ and reference/")
    parser.add_argument("--replicas", type=int, default=49, help="of the bootstrap")
    options = parser.parse_args(arguments)
    console = Console()
    if not (options.shared / "data").is_dir():
        console.print(f"{options.shared / 'data'} is not a folder; give the folder that holds the traces: --shared")
        return 2
    alone, together = read_traces(options.shared)
    result: dict[str, Any] = {"machine": this_machine().to_json(), "replicas": options.replicas}
    result["pairs"] = [row for name, trace in together.items() for row in compare_zones(name, trace)]
    console.print_json(json.dumps(result["pairs"]))
    result["zones"] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for name, trace in alone.items():  # a quarter of an hour: what is known is written at once
        result["zones"].append(assess(name, trace, options.replicas))
        console.print(_table(result["zones"][-1]))
        (options.out / "availability.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def read_traces(shared: Path) -> tuple[dict[str, AvailabilityTrace], dict[str, AvailabilityTrace]]:
    """Traces of single zones by name, and of several zones that were recorded together."""
    cases = shared / "reference" / "cases" / "spotserve" / "trace_g4dn_full.json"
    alone = {"g4dn (SpotServe)": started(read_spotserve_cases(cases)["trace_g4dn_full"])}
    alone["p3 (Parcae)"] = read_availability(shared / "data" / "parcae" / "p3_instance_count.csv")["p3_instance_count"]
    table, together = shared / "data" / "skypilot_spot_traces_changepoints.csv.gz", {}
    for nodes, kind in _SKYPILOT.items():
        (trace,) = read_availability(table, kind=kind, nodes=nodes).values()
        together[nodes] = trace
        alone |= {f"{zone}, {nodes}": one for zone, one in trace.zones.items()}
    return alone, together


def assess(name: str, trace: AvailabilityTrace, replicas: int) -> dict[str, Any]:
    """One zone: every number of regimes, and the bootstrap of the one that the fit chooses."""
    first, last = _split(trace, _FITTED * trace.duration_s)
    rows, chosen = [], fit([trace])
    for regimes in REGIMES:
        process = chosen if regimes == len(chosen.switching) else fit([trace], regimes=regimes)
        likelihood = log_likelihood(process, trace)
        held = fit([first], most=trace.most, regimes=regimes)
        rows.append(
            {
                "regimes": regimes,
                "log_likelihood": likelihood,
                "aic": 2 * (4 + 2 * regimes + regimes * (regimes - 1)) - 2 * likelihood,
                "held_out_log_likelihood": log_likelihood(held, last),
                "held_out": p_values(held, last),
                "tests": p_values(process, trace),
            }
        )
    row = {"zone": name, "hours": trace.duration_s / 3600, "changes": len(trace.counts) - 1, "most": trace.most}
    found = row | {"chosen": len(chosen.switching), "process": asdict(chosen), "fits": rows}
    plain = p_values(chosen, trace)
    if replicas and min(plain.values()) >= _REJECTED:
        found["bootstrap"] = bootstrap(chosen, trace, replicas)
    return found


def p_values(process: Process, trace: AvailabilityTrace) -> dict[str, float]:
    """p-values: waits and group sizes are uniform, and neither tells the next; medians over draws within ticks."""
    found = []
    for seed in range(_SEEDS):
        one = residuals(process, trace, seed)
        uniform = [kstest(values, "uniform").pvalue for values in (one.waits, one.sizes)]
        found.append([*uniform, *(spearmanr(values[:-1], values[1:]).pvalue for values in (one.waits, one.sizes))])
    names = ("waits", "sizes", "waits_in_a_row", "sizes_in_a_row")
    return {name: float(value) for name, value in zip(names, np.median(found, axis=0), strict=True)}


def bootstrap(process: Process, trace: AvailabilityTrace, replicas: int) -> dict[str, float]:
    """p-values of the Kolmogorov-Smirnov distances among those of traces of the process, each with its own fit."""
    own = _distances(process, trace)
    drawn = []
    for seed in range(replicas):
        made = in_ticks(generate(process, seed, trace.duration_s, trace.counts[0][1]), tick_s(trace))
        drawn.append(_distances(fit([made], most=trace.most, regimes=len(process.switching)), made))
    above = (np.array(drawn) >= own).sum(axis=0)
    return {name: float((1 + count) / (1 + replicas)) for name, count in zip(("waits", "sizes"), above, strict=True)}


def _distances(process: Process, trace: AvailabilityTrace) -> np.ndarray:
    found = [residuals(process, trace, seed) for seed in range(_SEEDS)]
    both = [[kstest(values, "uniform").statistic for values in (one.waits, one.sizes)] for one in found]
    return np.median(both, axis=0)


def tick_s(trace: AvailabilityTrace) -> float:
    """Seconds that all times of a trace are multiples of."""
    return float(np.gcd.reduce([round(1000 * time_s) for time_s, _ in trace.counts])) / 1000


def in_ticks(trace: AvailabilityTrace, every_s: float) -> AvailabilityTrace:
    """As who looks every so often sees it: what comes and goes in between is not seen."""
    changes, before = [], frozenset[str]()
    ends = sorted({-(-change.time_s // every_s) * every_s for change in trace.changes})
    for end in (end for end in ends if end <= trace.duration_s):
        now = trace.usable(end)
        for kind, names in (("remove", before - now), ("add", now - before)):
            if names:
                changes.append(Change(end, "add" if kind == "add" else "remove", tuple(sorted(names))))
        before = now
    return AvailabilityTrace(trace.name, tuple(changes), trace.duration_s // every_s * every_s)


def compare_zones(name: str, trace: AvailabilityTrace) -> Iterator[dict[str, Any]]:
    """Every two zones: fitted together with shared regimes, against each for itself, and how they were up together."""
    zones = trace.zones
    apart = {zone: fit([one], regimes=2) for zone, one in zones.items()}
    for pair in combinations(zones, 2):
        both = joined(name, {zone: _named(zones[zone]) for zone in pair})
        shared = fit([both], regimes=2)
        alone = sum(log_likelihood(apart[zone], _lasting(both, zone)) for zone in pair)
        yield {
            "nodes": name,
            "zones": pair,
            "aic_apart": 2 * 20 - 2 * alone,
            "aic_shared_regimes": 2 * 14 - 2 * log_likelihood(shared, both),
            "correlation_up": _correlation(both),
            "correlation_up_simulated": float(
                np.mean([_correlation(generate(shared, seed, both.duration_s, shared.most // 2)) for seed in range(9)])
            ),
        }


def _lasting(both: AvailabilityTrace, zone: str) -> AvailabilityTrace:
    """A zone as long as both were recorded."""
    return replace(both.zones[zone], duration_s=both.duration_s)


def _named(trace: AvailabilityTrace) -> AvailabilityTrace:
    """Instances without their zone."""
    changes = (
        replace(change, instances=tuple(name.rpartition("/")[2] for name in change.instances))
        for change in trace.changes
    )
    return replace(trace, changes=tuple(changes))


def _correlation(both: AvailabilityTrace) -> float:
    """Of how many are up in two zones, over time."""
    at_s = np.arange(0, both.duration_s, 300.0)
    if len(both.zones) < 2:
        return 0.0
    rows = []
    for trace in both.zones.values():
        starts, counts = np.array(trace.counts).T
        rows.append(counts[np.maximum(np.searchsorted(starts, at_s, side="right") - 1, 0)])
    return float(np.corrcoef(rows)[0, 1])


def _split(trace: AvailabilityTrace, at_s: float) -> tuple[AvailabilityTrace, AvailabilityTrace]:
    """Before and after the last change before `at_s`."""
    cut_s = max(time_s for time_s, _ in trace.counts if time_s <= at_s)
    first = replace(trace, changes=tuple(one for one in trace.changes if one.time_s <= cut_s), duration_s=cut_s)
    return first, started(trace, cut_s)


def _table(row: Mapping[str, Any]) -> Table:
    title = f"{row['zone']}: {row['hours']:.0f} h, {row['changes']} changes, bootstrap {row.get('bootstrap', '-')}"
    table = Table("regimes", "AIC", "held out", "p waits", "p sizes", "in a row", "", "p held out", "", title=title)
    for one in row["fits"]:
        values = [*one["tests"].values(), one["held_out"]["waits"], one["held_out"]["sizes"]]
        numbers = [f"{one['aic']:.0f}", f"{one['held_out_log_likelihood']:.1f}", *(f"{value:.3f}" for value in values)]
        table.add_row(str(one["regimes"]), *numbers)
    return table


if __name__ == "__main__":
    sys.exit(main())
