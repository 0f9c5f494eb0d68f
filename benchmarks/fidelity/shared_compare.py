"""A real run of several models beside its simulation: the share of requests that were answered within their SLO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.fidelity.compare import mean_of, seeds
from benchmarks.fidelity.drag import summary as drag_summary
from benchmarks.fidelity.shared_play import SharedPlayed
from benchmarks.fidelity.shared_profile import by_model, profile_of
from benchmarks.fidelity.shared_scripts import SharedScript
from benchmarks.fidelity.steps import quality
from data.models import ModelSpec
from planning.simulation.shared_fleet import Ask, simulate_shared

Result = dict[str, Any]
Answers = npt.NDArray[np.bool_]

ATTAINMENT_BAR = 0.03


def compared(
    script: SharedScript, seed: int, played: SharedPlayed, specs: Mapping[str, ModelSpec], *, processors: int
) -> Result:
    """One run beside its simulations. `processors`: those the fleet had."""
    told = replace(profile_of(script, played.steps, played.speeds, specs), processors=processors)
    groups = script.deployment.groups
    drawn_s = [simulate_shared(groups, told, played.asks, drag=played.drag, seed=one) for one in seeds(processors)]
    measured = _attainment(played.asks, np.array([stream.whole for stream in played.streams]))
    simulated = mean_of([_attainment(played.asks, np.isfinite(done_s)) for done_s in drawn_s])
    error = simulated["all"] - measured["all"]
    return {
        "name": script.name,
        "seed": seed,
        "groups": str(script.deployment),
        "demands": [asdict(one) for one in script.demands],
        "requests": len(played.asks),
        "seconds": round(played.asks[-1].arrival_s, 1),
        "foreign_cores": played.foreign_cores,
        "probe_ms": played.probe_ms,
        "drag": drag_summary(played.drag),
        "speeds": [asdict(one) for one in played.speeds],
        "laws": {
            model: quality(told.laws[script.shapes[model]], script.shapes[model][1], observed)
            for model, observed in by_model(played.steps).items()
        },
        "slo_s": {ask.model: ask.deadline_s for ask in played.asks},
        "measured": measured | {"refused": _share([not stream.times_s for stream in played.streams])},
        "simulated": simulated,
        "error": error,
        "met": abs(error) <= ATTAINMENT_BAR,
        "mean_s": mean_of([_means(played, done_s) for done_s in drawn_s]),
    }


def _attainment(asks: Sequence[Ask], whole: Answers) -> dict[str, float]:
    """Of every model, and of all together."""
    of_model = {
        model: float(np.mean(whole[[ask.model == model for ask in asks]])) for model in sorted({a.model for a in asks})
    }
    return of_model | {"all": float(np.mean(whole))}


def _share(which: Sequence[bool]) -> float:
    return float(np.mean(which))


def _means(played: SharedPlayed, done_s: npt.NDArray[np.float64]) -> dict[str, float]:
    """Mean latency of what was answered in time, measured and simulated."""
    took_s = [stream.latency_s for stream in played.streams if stream.whole]
    arrival_s = np.array([ask.arrival_s for ask in played.asks])
    answered = np.isfinite(done_s)
    return {
        "measured": float(np.mean(took_s)) if took_s else 0.0,
        "simulated": float(np.mean((done_s - arrival_s)[answered])) if answered.any() else 0.0,
    }
