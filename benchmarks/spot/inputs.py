"""What every run of the comparison shares: models, profiles, traces, arrivals, and the policies made from them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.spotserve_simulation import ARRIVALS, read_fleet, read_traces
from data.availability import AvailabilityTrace, Change, read_spotserve_cases
from data.catalog import instance_type
from data.placement import Shape
from planning.availability_fit import fit
from planning.simulation.serving_perennial import Target
from planning.spot_policy import Book, Load, Rule, build
from planning.step_costs import StepCosts
from planning.study.case import Case, Model, Times, loading

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference" / "cases" / "spotserve"
MODELS = ("6.7B", "20B", "30B")
TRACES = ("A_S", "B_S", "A_S+O", "B_S+O")
PUBLISHED_CV = 0.1  # what the arrivals called "CV 6" really have, at most
HOSTS = 10  # of the published runs, what Rerouting is pinned by
# What the published rates need on 8 instances, of one shape.
PINNED: dict[str, Target] = {
    "6.7B": (Shape(shards=4, stages=1), 8),
    "20B": (Shape(shards=8, stages=2), 2),
    "30B": (Shape(shards=8, stages=2), 2),
}
# Which dispatcher the published scripts ran: the new one for GPT-20B on A_S+O alone.
SCRIPTED_NEW = {("20B", "A_S+O")}
_FULL_START_S = 600.0  # 21 instances are up then; before, there are one or two


class Inputs:
    """Reads the reference folder once."""

    def __init__(self, folder: Path = REFERENCE, *, plain_prefill: bool = False) -> None:
        arrays = np.load(folder / "arrivals.npz")
        entries = json.loads((folder / "profiles.json").read_text(encoding="utf-8"))["profiles"]
        self.kind = instance_type("g4dn.12xlarge")
        self.traces = read_traces(folder)
        recording = read_spotserve_cases(folder / "trace_g4dn_full.json")["trace_g4dn_full"]
        self.full = replace(started(recording), name="g4dn, 10.6 h")
        self.process = fit([self.full])
        self.arrival_s: dict[str, Times] = {name: arrays[ARRIVALS[name]] for name in MODELS}
        self.models = {}
        for name in MODELS:
            entry, fleet = entries[name], read_fleet(folder, entries[name])
            costs = StepCosts(fleet.profile, fleet.model, plain_prefill=plain_prefill)
            rate_rps, required_rps = entry["arrival_rate_rps"], entry["required_rps"]
            self.models[name] = Model(
                name, self.kind, loading(fleet, costs), costs, rate_rps, required_rps, PINNED[name], HOSTS
            )
        self.book = cache(self._book)

    def _book(
        self, model: str, cv: float = PUBLISHED_CV, most: int = 12, rule: Rule = "optimal", slo_s: float | None = None
    ) -> Book:
        one = self.models[model]
        return build(one.costs, self.process.sized(most), Load(one.rate_rps, cv, slo_s), rule)

    def panel(self, model: str, trace: str) -> Case:
        """A panel of the paper."""
        return Case(self.models[model], self.traces[trace], self.arrival_s[model], self.book(model))


def long_arrivals(arrival_s: Times, duration_s: float) -> Times:
    """The published gaps, over and over."""
    gaps = np.diff(arrival_s, prepend=0.0)
    return np.cumsum(np.tile(gaps, int(duration_s / arrival_s[-1]) + 1))


def started(trace: AvailabilityTrace, at_s: float = _FULL_START_S) -> AvailabilityTrace:
    """The trace from `at_s` on, with whoever is up then at its start."""
    first = Change(0.0, "add", tuple(sorted(trace.usable(at_s))))
    later = [replace(change, time_s=change.time_s - at_s) for change in trace.changes if change.time_s > at_s]
    return AvailabilityTrace(trace.name, (first, *later), trace.duration_s - at_s)
