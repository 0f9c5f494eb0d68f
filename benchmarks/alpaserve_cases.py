"""Checker of AlpaServe's planning cases: our simulators against every recorded figure of every placement."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.alpaserve_files import PlanningCase, read_case, recorded_plans
from benchmarks.checks import Document, Folder, Verdict, exact, together
from data.placement import Arrivals, Placement, Schedule
from planning.simulation.discrete import discrete_replay
from planning.simulation.requests import TRIM_S, replay
from planning.simulation.tables import Tables

_TOLERANCE = 1e-4  # absolute: these are shares of requests


def check_placements(document: Document, folder: Folder) -> Iterator[Verdict]:
    """Attainment (trimmed and whole), mean latency and requests per group of each policy on each trace."""
    case = read_case(document, folder.path)
    tables = Tables.of(case.fleet, case.shapes)
    for policy, entry in case.recorded.items():
        for trace, plan, arrivals, figures in recorded_plans(case, entry):
            yield _check(f"{case.name} {policy} {trace}", tables, plan, arrivals, figures)
    if "des_check" in document:
        yield _check_discrete(case, document["des_check"])


def _check(name: str, tables: Tables, plan: Schedule, arrivals: Arrivals, figures: Document) -> Verdict:
    single = len(plan.placements) == 1
    outcome = replay(tables, plan.placements[0] if single else plan, arrivals)
    sent = np.bincount(outcome.group[outcome.group >= 0], minlength=len(figures["group_num_requests"]))
    return together(
        name,
        [
            _near("attainment", outcome.attainment(arrivals), figures["attainment_warmup10"]),
            _near("untrimmed", float(outcome.good.mean()), figures["attainment_all"]),
            _near("latency", outcome.mean_latency_s, figures["latency_mean_incl_rejected_as_0"]),
            exact("groups", requests=(sent.tolist(), figures["group_num_requests"])),
            exact("trace", requests=(len(arrivals), figures["num_requests"])),
        ],
    )


def _check_discrete(case: PlanningCase, recorded: Document) -> Verdict:
    arrivals = case.train.part(0, recorded["num_requests"])
    placement = Placement.from_json(case.recorded[recorded["policy"]]["placement"])
    good = discrete_replay(case.fleet, placement, arrivals)
    begin, end = arrivals.trimmed(TRIM_S)
    found = float(good[begin:end].mean())
    return _near(f"{case.name} {recorded['policy']} discrete events", found, recorded["des_attainment"])


def _near(case: str, found: float, wanted: float) -> Verdict:
    miss = abs(found - wanted)
    met = miss <= _TOLERANCE
    return Verdict(case, 0.0 if met else miss or 1.0, "" if met else f"{found:.6f} instead of {wanted:.6f}")
