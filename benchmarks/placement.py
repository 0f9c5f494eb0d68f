"""`python -m benchmarks.placement --cases DIR --out DIR`: places the models of every planning case, and says how well.

Per case one JSON file: the placement, the seconds of the search, attainment on the given and the held-out traces
under three rules, an upper bound, and AlpaServe's searches timed on the same machine. All cases together: a table.
Everything runs in one thread and is compiled before. Published searches are medians of several runs, in wall clock and
in seconds of the processor; ratios are of the latter, which other work on the machine does not lengthen by waiting.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.alpaserve_files import PlanningCase, is_planning_case, read_case
from data.errors import PerennialError
from data.placement import Arrivals, Placement
from planning.placement.beam import alg1_beam
from planning.placement.bound import bound
from planning.placement.buckets import mp_search_sep
from planning.placement.feasibility import breaches, device_bytes, require_feasible
from planning.placement.policies import policy
from planning.placement.problem import Problem
from planning.placement.search import rehearse, search
from planning.placement.uniform import Found, mp_search
from planning.simulation.board import simulate_all
from planning.simulation.discrete import discrete_replay
from planning.simulation.earliest_deadline import serving_replay
from planning.simulation.requests import TRIM_S, Replay, replay

_REFERENCE_RPS = {"c06": 65_000.0, "c08": 87_000.0, "c10": 68_000.0}  # interpreter speed where times were recorded
_REPEATS = 3
_RUNS = 7  # of a published search
_WIDTH = 220  # of the table where there is no terminal
_ORACLES = ("sr-replace",)  # they see the trace they are judged on
_PUBLISHED: dict[str, Callable[[Problem], Found]] = {"mp-search": mp_search, "mp-search-sep": mp_search_sep}


def load_cases(folder: Path) -> Iterator[PlanningCase]:
    """Every planning case of a folder, in order of file name."""
    for file in sorted(folder.glob("*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(document, dict) and is_planning_case(document):
            yield read_case(document, folder)


def machine_scale(folder: Path) -> float | None:
    """How much slower this machine interprets than the one of the recorded seconds; None without `score.py`.

    What `score.py --calibrate` measures, in seconds of the processor, and the least of a few measurements: other work
    on the machine must not make the recorded seconds look longer.
    """
    files = [next(iter(sorted(folder.glob(f"{name}_*.json"))), None) for name in _REFERENCE_RPS]
    specification = spec_from_file_location("score", folder / "score.py")
    if not (folder / "score.py").exists() or not all(files) or specification is None or specification.loader is None:
        return None
    scorer = module_from_spec(specification)
    specification.loader.exec_module(scorer)
    cases = [scorer.Case(str(file)) for file in files]
    wanted = list(zip(_REFERENCE_RPS.values(), cases, strict=True))
    return min(median(rps / _interpreted_rps(scorer, case) for rps, case in wanted) for _ in range(_REPEATS))


def _interpreted_rps(scorer: Any, case: Any) -> float:
    """Requests per second of the interpreted discrete-event simulator on the first 6000 requests."""
    arrival, model = case.traces["train"]
    count, groups = min(6000, len(arrival)), case.doc["results"]["mp-search"]["placement"]["groups"]
    return count / _seconds(lambda: scorer.des_replay(case, groups, arrival[:count], model[:count]))


def place(case: PlanningCase, budget_s: float, seeds: int, scale: float | None) -> dict[str, Any]:
    """Everything that is reported of a case; the first seed is the one that counts."""
    require_feasible(case.fleet)
    runs = [_search(case, budget_s, seed) for seed in range(seeds)]
    placement = Placement.from_json(runs[0]["placement"])
    problem = Problem(case.fleet, case.train)
    limit = bound(problem)
    return {
        "case": case.name,
        **runs[0],
        "breaches": breaches(case.fleet, placement),
        "device_gib": device_bytes(case.fleet, placement) / 2**30,
        "budget_gib": case.fleet.budget_bytes / 2**30,
        "rules": _under_every_rule(problem, placement, case),
        "bound": limit.attainment,
        "bound_memory_only": limit.memory_only,
        "bound_uniform_groups": limit.uniform,
        "gap": limit.attainment - runs[0]["train"],
        "gap_uniform_groups": limit.uniform - runs[0]["train"],
        "seeds": [{key: run[key] for key in ("seed", "train", "heldout_mean", "search_s")} for run in runs],
        "recorded": _recorded(case),
        "published": {name: _published(case, name, scale) for name in _PUBLISHED},
        "policies": {name: _again(case, name, entry) for name, entry in case.recorded.items() if "train" in entry},
        "simulator": _speeds(problem, placement),
    }


def _search(case: PlanningCase, budget_s: float, seed: int) -> dict[str, Any]:
    problem = Problem(case.fleet, case.train)
    started, worked = time.perf_counter(), time.thread_time()
    found = search(problem, time.perf_counter, budget_s, seed)
    search_s = time.perf_counter() - started
    share = (time.thread_time() - worked) / search_s  # of a processor, beside other work on the machine
    heldout = [replay(problem.tables, found.placement, trace).attainment(trace) for trace in case.heldout]
    return {
        "placement": found.placement.to_json(),
        "seed": seed,
        "budget_s": budget_s,
        "search_s": search_s,
        "processor_share": share,
        "start": found.start,
        "proposals": found.proposals,
        "kept": found.accepted,
        "climbs": found.climbs,
        "simulated_rps_in_climb": found.simulated / max(found.climbing_s * share, 1e-9),
        "replayed_rps_in_climb": found.proposals * found.trace_requests / max(found.climbing_s * share, 1e-9),
        "train": found.attainment,
        "heldout": heldout,
        "heldout_mean": mean(heldout) if heldout else None,
    }


def _under_every_rule(problem: Problem, placement: Placement, case: PlanningCase) -> dict[str, Any]:
    """Attainment on every trace by AlpaServe's fast simulator, its discrete events, and the serving tier's rule."""

    def discrete(trace: Arrivals) -> float:
        begin, end = trace.trimmed(TRIM_S)
        good = discrete_replay(case.fleet, placement, trace)[begin:end]
        return float(good.mean()) if len(good) else float("nan")

    rules: dict[str, Callable[[Arrivals], float]] = {
        "fast": lambda trace: replay(problem.tables, placement, trace).attainment(trace),
        "discrete_events": discrete,
        "serving": lambda trace: serving_replay(problem.tables, placement, trace).attainment(trace),
    }
    return {
        name: {"train": rule(case.train), "heldout": [rule(trace) for trace in case.heldout]}
        for name, rule in rules.items()
    }


def _recorded(case: PlanningCase) -> dict[str, Any]:
    """The best that others reached on the case, oracles apart."""
    entries = {name: entry for name, entry in case.recorded.items() if "train" in entry}
    fair = {name: entry for name, entry in entries.items() if not name.startswith(_ORACLES)}
    train = {name: entry["train"]["attainment_warmup10"] for name, entry in fair.items()}
    heldout = {name: entry["heldout_mean_attainment_warmup10"] for name, entry in fair.items()}
    return {
        "best_train": max(train.values(), default=None),
        "best_train_by": max(train, key=lambda name: train[name], default=None),
        "best_heldout": max(heldout.values(), default=None),
        "best_heldout_by": max(heldout, key=lambda name: heldout[name], default=None),
        "oracles": {
            name: [entries[name]["train"]["attainment_warmup10"], entries[name]["heldout_mean_attainment_warmup10"]]
            for name in entries.keys() - fair.keys()
        },
    }


def _published(case: PlanningCase, name: str, scale: float | None) -> dict[str, Any]:
    """AlpaServe's search by its name: seconds and attainment here, beside those recorded."""
    wall_s, seconds = [], []
    for _ in range(_RUNS):
        problem = Problem(case.fleet, case.train)
        _ = problem.trace, problem.costs  # made when a case is read
        started, worked = time.perf_counter(), time.thread_time()
        found = _PUBLISHED[name](problem)
        wall_s.append(time.perf_counter() - started)
        seconds.append(time.thread_time() - worked)
    heldout = [replay(problem.tables, found.placement, trace).attainment(trace) for trace in case.heldout]
    result: dict[str, Any] = {
        "search_s": median(seconds),
        "search_wall_s": median(wall_s),
        "train": replay(problem.tables, found.placement, case.train).attainment(case.train),
        "heldout_mean": mean(heldout) if heldout else None,
    }
    entry = case.recorded.get(name, {})
    if "train" in entry:
        result |= {
            "recorded_s": entry["search_time_s"],
            "recorded_train": entry["train"]["attainment_warmup10"],
            "recorded_heldout_mean": entry["heldout_mean_attainment_warmup10"],
            "quicker": entry["search_time_s"] / median(seconds),
            "quicker_scaled": entry["search_time_s"] * scale / median(seconds) if scale else None,
        }
    return result


def _again(case: PlanningCase, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded policy by its published name: attainment on the given trace here, beside that recorded."""
    result: dict[str, Any] = {"recorded_train": entry["train"]["attainment_warmup10"]}
    problem = Problem(case.fleet, case.train)
    try:
        plan = policy(name)(problem)
    except PerennialError as error:
        return result | {"error": str(error)}
    return result | {"train": replay(problem.tables, plan, case.train).attainment(case.train)}


def _speeds(problem: Problem, placement: Placement) -> dict[str, float]:
    """Requests per second of one replay, and of one simulation as a search calls it; medians."""
    ready, board = Replay(problem.tables, placement), problem.board_with(placement)
    calls: dict[str, Callable[[], object]] = {
        "replay_rps": lambda: ready.run(problem.arrivals),
        "search_call_rps": lambda: simulate_all(problem.costs, problem.trace, board),
    }
    return {name: len(problem.arrivals) / median(_seconds(call) for _ in range(30)) for name, call in calls.items()}


def _seconds(call: Callable[[], object]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


_COLUMNS = (
    "case", "train", "best recorded", "held-out", "best recorded", "discrete", "serving", "bound", "gap",
    "uniform bound", "search s", "mp-search ×", "scaled", "sep ×", "scaled", "groups",
)  # fmt: skip


def _row(result: dict[str, Any]) -> list[str]:
    recorded, rules = result["recorded"], result["rules"]
    shapes = [f"({group['op']},{group['pp']})" for group in result["placement"]["groups"]]
    return [
        result["case"],
        _share(result["train"]),
        _share(recorded["best_train"]),
        _share(result["heldout_mean"]),
        _share(recorded["best_heldout"]),
        *(
            _share(mean(rules[name]["heldout"]) if result["heldout"] else None)
            for name in ("discrete_events", "serving")
        ),
        _share(result["bound"]),
        _share(result["gap"]),
        _share(result["bound_uniform_groups"]),
        f"{result['search_s']:.2f}",
        *(_times(result["published"][name].get(key)) for name in _PUBLISHED for key in ("quicker", "quicker_scaled")),
        " ".join(f"{shapes.count(shape)}×{shape}" for shape in dict.fromkeys(shapes)),
    ]


def _mean(values: list[float]) -> float | None:
    return mean(values) if values else None


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _markdown(rows: list[list[str]]) -> str:
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _warm_up(cases: Sequence[PlanningCase]) -> None:
    """Compile everything before anything is timed."""
    for one in cases:
        rehearse(Problem(one.fleet, one.train))
    case = cases[0]
    short = PlanningCase(
        case.name, case.fleet, case.train.part(0, min(300, len(case.train))), case.heldout[:1], {}, case.document
    )
    place(short, 0.05, 1, None)
    alg1_beam(Problem(case.fleet, short.train))


def main(arguments: list[str] | None = None) -> int:
    """Place every case; 1 if a case cannot be placed, 2 if there is none."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.placement", description=__doc__)
    parser.add_argument("--cases", type=Path, required=True, help="folder of planning cases (schema 2)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--budget-s", type=float, default=10.0, help="seconds of search per case and seed")
    parser.add_argument("--seeds", type=int, default=1, help="searches per case; the first one counts")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    options = parser.parse_args(arguments)
    console = Console(width=_WIDTH if not sys.stdout.isatty() else None)
    cases = [case for case in load_cases(options.cases) if case.name.startswith(options.only)]
    if not cases:
        console.print(f"{options.cases} holds no planning case; give a folder with cNN_*.json and their .npz files")
        return 2
    return _report(cases, options, console)


def _report(cases: list[PlanningCase], options: argparse.Namespace, console: Console) -> int:
    from profiling.fingerprint import this_machine  # torch takes seconds that a wrong folder need not cost

    options.out.mkdir(parents=True, exist_ok=True)
    scale = machine_scale(options.cases)
    machine = this_machine(numpy=np.__version__).to_json()
    _warm_up(cases)
    rows, failed = [], []
    for case in track(cases, description="placing", console=console):
        try:
            result = place(case, options.budget_s, options.seeds, scale)
        except PerennialError as error:
            failed.append(f"{case.name}: {error}")
            continue
        document = {"machine": machine, "interpreter_scale": scale, **result}
        (options.out / f"{case.name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        rows.append(_row(result))
    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    (options.out / "table.md").write_text(_markdown(rows), encoding="utf-8")
    for line in failed:
        console.print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
