"""The study: panels, bursts, the whole recording, ablation, cost, book times, and bounds, as JSON values."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.spot.inputs import (
    MODELS,
    PUBLISHED_CV,
    SCRIPTED_NEW,
    TRACES,
    Inputs,
    long_arrivals,
)
from planning.simulation.serving import Outcome, constant
from planning.simulation.serving_perennial import Charges
from planning.simulation.serving_spotserve import simulate_constant
from planning.spot_policy import Book, Load, build
from planning.study.case import Case, Model, Times, gamma_times
from planning.study.fleets import capped
from planning.study.results import longest_pause_s, over_time
from planning.study.systems import (
    ablations,
    oracle,
    perennial,
    perennial_fallback,
    reparallelization,
    rerouting,
    rerouting_best,
    skyserve,
    spotserve,
)

Result = dict[str, Any]
Progress = Callable[[str], None]

CVS = (1.0, 6.0)
ON_DEMAND = 8  # instances of the cost bar
_PRICED = ("ours", "ours, with on-demand", "SkyServe-like")
_DRAWN = ("SpotServe, new batching", "ours")
_FEW = 5  # seeds where the question is only whether a result hangs on one assumption
_CAPS = range(3, 11)
_WORST = Charges(slowdown=1.25)  # of our measurements, not their median
_LONG_RUNS: Mapping[str, Callable[[Case], Outcome]] = {
    "SpotServe, old batching": partial(spotserve, fill=True),
    "SpotServe, new batching": partial(spotserve, fill=False),
    "Reparallelization, new": partial(reparallelization, fill=False),
    "Rerouting pinned, new": partial(rerouting, fill=False),
    "SkyServe-like": skyserve,
    "ours": perennial,
    "ours, with on-demand": perennial_fallback,
    "oracle": oracle,
}


def run(inputs: Inputs, seeds: int, progress: Progress) -> Result:
    """Everything; `progress` is told what is under way."""
    panels = list(_panels(inputs, progress))
    return {
        "process": _process(inputs),
        "panels": panels,
        "bursts": list(_bursts(inputs, seeds, progress)),
        "full_trace": list(_full(inputs, progress)),
        "ablation": list(_ablation(inputs, progress)),
        "cost": list(_cost(inputs, progress)),
        "on_demand": _on_demand(inputs),
        "books": list(_books(inputs, progress)),
        "robustness": _robustness(inputs, progress),
    }


def _process(inputs: Inputs) -> Result:
    """Whether it describes the recording is `benchmarks.availability`'s to say."""
    return asdict(inputs.process)


def shown(outcome: Outcome) -> Result:
    """Mean, percentiles, unfinished, longest pause, bytes."""
    found = outcome.summary()
    return {
        "mean_s": found.mean_s,
        "p50_s": found.p50_s,
        "p90_s": found.p90_s,
        "p99_s": found.p99_s,
        "requests": found.requests,
        "unfinished_at_end": found.unfinished,
        "longest_pause_s": longest_pause_s(outcome),
        "moved_gb": sum(one.moved_bytes for one in outcome.transitions) / 1e9,
    }


def _panels(inputs: Inputs, progress: Progress) -> Iterator[Result]:
    for model in MODELS:
        for trace in TRACES:
            progress(f"{model} on {trace}")
            case = inputs.panel(model, trace)
            new = (model, trace) in SCRIPTED_NEW
            outcomes = {
                "SpotServe, old batching": spotserve(case, fill=True),
                "SpotServe, new batching": spotserve(case, fill=False),
                "Reparallelization, old": reparallelization(case, fill=True),
                "Reparallelization, new": reparallelization(case, fill=False),
                "Rerouting pinned, old": rerouting(case, fill=True),
                "Rerouting pinned, new": rerouting(case, fill=False),
                "Rerouting best, old": rerouting_best(case, fill=True),
                "Rerouting best, new": rerouting_best(case, fill=False),
                "SkyServe-like": skyserve(case),
                "ours": perennial(case),
                "ours, with on-demand": perennial_fallback(case),
                "ours, worst slowdown": perennial(case, _WORST),
                "oracle": oracle(case),
            }
            costs = inputs.models[model].costs
            yield {
                "model": model,
                "trace": trace,
                "scripted": "new" if new else "old",
                "systems": {name: shown(outcome) for name, outcome in outcomes.items()},
                "least_request_s": min(costs.least_s(shape) for shape in costs.shapes()),
                "usd": {name: outcomes[name].usd for name in _PRICED},
                "counts": list(case.trace.counts),
                "over_time": {name: over_time(outcomes[name]) for name in _DRAWN},
                "events": [
                    {"t_s": one.time_s, "stop_s": one.stop_s, "ready_s": one.ready_s, "shape": list(one.shape),
                     "moved_gb": one.moved_bytes / 1e9}
                    for one in outcomes["ours"].transitions
                ],
            }  # fmt: skip


def _bursts(inputs: Inputs, seeds: int, progress: Progress) -> Iterator[Result]:
    for cv in CVS:
        for model in MODELS:
            one = inputs.models[model]
            book = inputs.book(model, cv)
            for trace in TRACES:
                progress(f"{model} on {trace}, CV {cv:g}, {seeds} seeds")
                rows = []
                for seed in range(seeds):
                    times = gamma_times(one.rate_rps, cv, seed, inputs.traces[trace].duration_s)
                    case = Case(one, inputs.traces[trace], times, book)
                    runs = (spotserve(case, fill=True), spotserve(case, fill=False), perennial(case))
                    rows.append([outcome.summary().p99_s for outcome in runs])
                table = np.array(rows)
                yield {
                    "model": model,
                    "trace": trace,
                    "cv": cv,
                    "p99_s": table.mean(axis=0).tolist(),
                    "ratio_old": _interval(table[:, 0] / table[:, 2]),
                    "ratio_new": _interval(table[:, 1] / table[:, 2]),
                    "ratio_better": _interval(table[:, :2].min(axis=1) / table[:, 2]),
                    "never_worse": bool((table[:, 2] <= table[:, :2].min(axis=1)).all()),
                }


def _interval(ratios: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """Geometric mean with its 95 % interval over seeds (Student's t of the logarithms)."""
    logs = np.log(ratios)
    half = 0.0
    if len(logs) > 1:
        half = float(student.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs)))
    middle = float(logs.mean())
    return [float(np.exp(middle)), float(np.exp(middle - half)), float(np.exp(middle + half))]


def _full(inputs: Inputs, progress: Progress) -> Iterator[Result]:
    for model in MODELS:
        progress(f"{model} on the whole recording")
        one = inputs.models[model]
        times = long_arrivals(inputs.arrival_s[model], inputs.full.duration_s)
        case = Case(one, inputs.full, times, inputs.book(model, most=inputs.full.most))
        found, took = {}, {}
        for name, system in _LONG_RUNS.items():
            begun = time.perf_counter()
            found[name] = shown(system(case))
            took[name] = time.perf_counter() - begun
        yield {"model": model, "systems": found, "seconds": took, "changes": len(inputs.full.counts)}


def _ablation(inputs: Inputs, progress: Progress) -> Iterator[Result]:
    for model in MODELS:
        for trace in TRACES:
            progress(f"ablation, {model} on {trace}")
            case = inputs.panel(model, trace)
            yield {
                "model": model,
                "trace": trace,
                "systems": {name: shown(run_()) for name, run_ in ablations(case).items()},
            }


def _cost(inputs: Inputs, progress: Progress) -> Iterator[Result]:
    """GPT-20B with at most so many instances, against 8 on demand."""
    model = "20B"
    for trace in TRACES:
        progress(f"cost on {trace}")
        for most in _CAPS:
            taken = capped(inputs.traces[trace], most)
            case = replace(inputs.panel(model, trace), trace=taken)
            outcome = perennial(case)
            found, dollars = outcome.summary(), outcome.usd
            full = case.on_demand_usd(ON_DEMAND * taken.duration_s)
            yield {
                "trace": trace,
                "most": most,
                "mean_s": found.mean_s,
                "p99_s": found.p99_s,
                "usd": dollars,
                "on_demand_usd": full,
                "saved": 1 - dollars / full,
            }


def _on_demand(inputs: Inputs) -> Result:
    """GPT-20B on 8 on-demand instances: the published engine in both modes, and ours."""
    model, arrival_s = inputs.models["20B"], inputs.arrival_s["20B"]
    config = model.fleet.choose(ON_DEMAND, model.required_rps)
    assert config is not None
    found: Result = {}
    for mode, fill in (("old", True), ("new", False)):
        outcome = simulate_constant(model.fleet, config, arrival_s, 1020.0, fill=fill)
        found[f"SpotServe's engine, {mode} batching"] = shown(outcome)
    case = Case(model, constant(ON_DEMAND, 1020.0), arrival_s, inputs.book("20B"))
    found["ours"] = shown(perennial(case))
    found["price_ratio_saves"] = 1 - model.kind.price_spot_usd_h / model.kind.price_on_demand_usd_h
    layouts = inputs.book("20B").layouts
    found["p99_by_instances"] = {
        str(shape.devices * count // model.costs.gpus): p99
        for (shape, count), p99 in sorted(zip(layouts.targets, layouts.p99_s, strict=True), key=lambda pair: -pair[1])
    }
    return found


def _books(inputs: Inputs, progress: Progress) -> Iterator[Result]:
    """How long a book takes to make, and a lookup."""
    for model in MODELS:
        for most in (12, 48, 256):
            progress(f"book of {model} for {most} instances")
            one = inputs.models[model]
            begun = time.perf_counter()
            book = build(one.costs, inputs.process.sized(most), Load(one.rate_rps, 0.1))
            took = time.perf_counter() - begun
            begun = time.perf_counter()
            for count in range(1000):
                book.target(count % most, None)
            lookup = (time.perf_counter() - begun) / 1000
            optimal = book.solution.average
            yield {
                "model": model,
                "instances": most,
                "seconds": took,
                "lookup_ms": lookup * 1e3,
                "options": len(book.layouts.targets),
                "average": optimal,
                "choices": {str(count): book.explain(count) for count in range(1, 13)} if most == 12 else {},
            }


def _robustness(inputs: Inputs, progress: Progress) -> Result:
    """Without the published division of prefill times, for us alone: SpotServe keeps it."""
    plain = Inputs(plain_prefill=True)
    rows = []
    for cv in (PUBLISHED_CV, *CVS):
        for model in MODELS:
            one, book = plain.models[model], plain.book(model, cv)
            for trace in TRACES:
                progress(f"without the published division, {model} on {trace}, CV {cv:g}")
                ratios = [_plain_ratio(inputs, one, book, trace, cv, seed) for seed in range(1 if cv < 1 else _FEW)]
                rows.append({"model": model, "trace": trace, "cv": cv, "ratio_better": _interval(np.array(ratios))})
    return {"ours with prefill not divided": rows}


def _plain_ratio(inputs: Inputs, model: Model, book: Book, trace: str, cv: float, seed: int) -> float:
    """P99 of SpotServe's better mode over ours."""
    fleet = inputs.traces[trace]
    times: Times = inputs.arrival_s[model.name]
    if cv != PUBLISHED_CV:
        times = gamma_times(model.rate_rps, cv, seed, fleet.duration_s)
    case = Case(model, fleet, times, book)
    theirs = min(spotserve(case, fill=fill).summary().p99_s for fill in (False, True))
    return theirs / perennial(case).summary().p99_s
