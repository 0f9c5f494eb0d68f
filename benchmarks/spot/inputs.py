"""What every run of the comparison shares: models, profiles, traces, arrivals, and the policies made from them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.spotserve_simulation import ARRIVALS, read_fleet, read_traces
from data.availability import AvailabilityTrace, Change, read_spotserve_cases
from data.synthesis import gamma_gaps
from planning.availability import fit, fit_p_value
from planning.simulation.serving_spotserve import StaticFleet
from planning.spot_policy import Book, Load, Rule, build
from planning.step_costs import StepCosts

Times = npt.NDArray[np.float64]

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "cases" / "spotserve"
MODELS = ("6.7B", "20B", "30B")
TRACES = ("A_S", "B_S", "A_S+O", "B_S+O")
DISK_BYTES_PER_S = 1.5e9  # with it Reparallelization comes nearest to its published seconds
PUBLISHED_CV = 0.1  # what the arrivals called "CV 6" really have, at most
HOSTS = 10  # of the published runs, what Rerouting is pinned by
ON_DEMAND_USD_H, SPOT_USD_H = 3.912, 1.9046
# Which dispatcher the published scripts ran: the new one for GPT-20B on A_S+O alone.
SCRIPTED_NEW = {("20B", "A_S+O")}
_OVERLAP_S = 60.0  # for which a stand-in stays beside the spot instance that takes over
_FULL_START_S = 600.0  # 21 instances are up then; before, there are one or two


@dataclass(frozen=True, slots=True)
class Model:
    """One model: what the published system runs it with, and what ours does, from one profile."""

    name: str
    fleet: StaticFleet
    costs: StepCosts
    rate_rps: float
    required_rps: float
    arrival_s: Times


class Inputs:
    """Reads the reference folder once."""

    def __init__(self, folder: Path = REFERENCE, *, plain_prefill: bool = False) -> None:
        arrays = np.load(folder / "arrivals.npz")
        entries = json.loads((folder / "profiles.json").read_text(encoding="utf-8"))["profiles"]
        self.traces = read_traces(folder)
        self.full = _started(read_spotserve_cases(folder / "trace_g4dn_full.json")["trace_g4dn_full"])
        self.process = fit([self.full])
        self.models = {}
        for name in MODELS:
            fleet = read_fleet(folder, entries[name])
            costs = StepCosts(fleet.profile, fleet.model, plain_prefill=plain_prefill)
            smallest = min(costs.shapes(), key=lambda shape: shape.devices)
            role = float(costs.roles(smallest)[0].sum()) * costs.cell_bytes
            load_s = (role + costs.embedding_bytes * costs.gpus) / DISK_BYTES_PER_S
            entry = entries[name]
            self.models[name] = Model(
                name,
                replace(fleet, load_s=load_s),
                costs,
                entry["arrival_rate_rps"],
                entry["required_rps"],
                arrays[ARRIVALS[name]],
            )
        self.book = cache(self._book)

    def _book(self, model: str, cv: float = PUBLISHED_CV, most: int = 12, rule: Rule = "optimal") -> Book:
        one = self.models[model]
        return build(one.costs, replace(self.process, most=most), Load(one.rate_rps, cv), rule)

    @property
    def fit_p_value(self) -> float:
        """How well the availability process describes the recording."""
        return fit_p_value(self.process, [self.full])


def bursty(model: Model, cv: float, seed: int, duration_s: float) -> Times:
    """Arrivals of the model's rate whose gaps truly have that coefficient of variation."""
    count = int(2 * duration_s * model.rate_rps) + 50
    gaps = gamma_gaps(np.random.default_rng(seed), gaps=count, rate_rps=model.rate_rps, cv=cv, exact=False)
    return np.cumsum(gaps)


def long_arrivals(model: Model, duration_s: float) -> Times:
    """The published gaps, over and over."""
    gaps = np.diff(model.arrival_s, prepend=0.0)
    return np.cumsum(np.tile(gaps, int(duration_s / model.arrival_s[-1]) + 1))


def _started(trace: AvailabilityTrace) -> AvailabilityTrace:
    first = Change(0.0, "add", tuple(sorted(trace.usable(_FULL_START_S))))
    later = [
        replace(change, time_s=change.time_s - _FULL_START_S)
        for change in trace.changes
        if change.time_s > _FULL_START_S
    ]
    return AvailabilityTrace("g4dn, 10.6 h", (first, *later), trace.duration_s - _FULL_START_S)


def capped(trace: AvailabilityTrace, most: int, launch_s: float = 120.0) -> AvailabilityTrace:
    """No more than `most` instances are taken; a lost one is replaced `launch_s` after its notice, if there is one."""
    there: list[str] = []
    taken: list[str] = []
    changes: list[Change] = []
    for change in trace.changes:
        if change.kind == "add":
            there += change.instances
            when = change.time_s
        else:
            gone = tuple(name for name in change.instances if name in taken)
            there = [name for name in there if name not in change.instances]
            taken = [name for name in taken if name not in gone]
            if gone:
                changes.append(replace(change, instances=gone))
            when = max(change.time_s, change.time_s - change.notice_s + launch_s)
        new = tuple(name for name in there if name not in taken)[: max(most - len(taken), 0)]
        if new and when < trace.duration_s:
            taken += new
            changes.append(Change(when, "add", new, 30.0 if when else 0.0))
    return _tidy(trace, most, changes)


def _tidy(trace: AvailabilityTrace, most: int, changes: list[Change]) -> AvailabilityTrace:
    """In order of time; an instance that is gone before it would have been ready is never taken."""
    ordered = sorted(changes, key=lambda change: (change.time_s, change.kind == "add"))
    up: set[str] = set()
    kept: list[Change] = []
    ended = {name: change.time_s for change in trace.changes if change.kind == "remove" for name in change.instances}
    for change in ordered:
        if change.kind == "add":
            names = tuple(name for name in change.instances if ended.get(name, np.inf) > change.time_s)
            up |= set(names)
        else:
            names = tuple(name for name in change.instances if name in up)
            up -= set(names)
        if names:
            kept.append(replace(change, instances=names))
    return AvailabilityTrace(f"{trace.name}, at most {most}", tuple(kept), trace.duration_s)


def with_fallback(trace: AvailabilityTrace, wanted: int, launch_s: float = 120.0) -> tuple[AvailabilityTrace, float]:
    """On-demand instances stand in for missing spot ones, `launch_s` after the loss is known, until they have returned.

    Returns the trace with them and their instance-seconds.
    """
    changes = [change for change in trace.changes if change.kind != "rate"]
    hired, spent, number = list[tuple[float, str]](), 0.0, 0
    for time_s, count in trace.counts:
        while len(hired) > max(wanted - count, 0):
            since, name = hired.pop()
            end_s = min(time_s + _OVERLAP_S, trace.duration_s)
            if since < end_s:
                changes.append(Change(end_s, "remove", (name,), 30.0))
                spent += end_s - since
            else:
                changes = [change for change in changes if change.instances != (name,)]
        while len(hired) < wanted - count:
            number += 1
            ready_s = max(time_s - 30.0 + launch_s, 0.0) if time_s else 0.0
            if ready_s >= trace.duration_s:
                hired.append((trace.duration_s, ""))
                continue
            hired.append((ready_s, f"on-demand-{number}"))
            changes.append(Change(ready_s, "add", (f"on-demand-{number}",), 30.0 if ready_s else 0.0))
    spent += sum(max(trace.duration_s - since, 0.0) for since, _ in hired)
    ordered = sorted(changes, key=lambda change: (change.time_s, change.kind != "add"))
    return AvailabilityTrace(f"{trace.name} with on-demand", tuple(ordered), trace.duration_s), spent
