"""A real run beside its simulation: latencies, errors against the bars, and the changes of the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import isfinite
from typing import Any

import numpy as np

from benchmarks.fidelity.calibration import calibrated, profile
from benchmarks.fidelity.drag import eased
from benchmarks.fidelity.drag import summary as drag_summary
from benchmarks.fidelity.measure import Measured
from benchmarks.fidelity.play import Played, book_of
from benchmarks.fidelity.scripts import Script
from benchmarks.fidelity.steps import quality
from data.models import ModelSpec
from planning.simulation.fleet import Served, simulate_fleet
from planning.simulation.fleet_profile import Charges
from planning.simulation.serving import Array, Outcome
from planning.step_laws import StepLaw
from serving.requests import Event

Result = dict[str, Any]

MEAN_BAR, P99_BAR = 0.10, 0.15
_DRAWS = 8  # of who stands still when; what is predicted is the mean
TRACE = "trace"  # what figures are drawn from: request by request, of one draw; too much for a results file


def compared(
    script: Script,
    seed: int,
    recorded: tuple[Played, Measured],
    charges: Charges,
    spec: ModelSpec,
    *,
    processors: int,
    feel: float = 1.0,
) -> Result:
    """One run beside its simulations. `processors`: those the fleet had; `feel`: how much of the drag steps feel."""
    played, own = recorded[0], recorded[1].eased(feel)
    told = replace(calibrated(profile(own, charges, spec), own, script), processors=processors)
    book = book_of(script, spec)
    course = eased(played.drag, feel)
    story = played.workload, played.happenings, played.instances, played.layout
    draws = [simulate_fleet(book, told, *story, drag=course, seed=one) for one in seeds(processors)]
    served = draws[0]
    latency_s = np.array([stream.latency_s for stream in played.streams])
    first_s = np.array([stream.first_s for stream in played.streams])
    measured, predicted = _summary(served.arrival_s, latency_s, first_s), mean_of([_of(one) for one in draws])
    errors = {key: predicted[key] / measured[key] - 1 for key in ("mean_s", "p99_s", "first_mean_s")}
    return {
        "name": script.name,
        "seed": seed,
        "layouts": {str(count): layout for count, layout in script.layouts.items()},
        "requests": len(latency_s),
        "rate_rps": round(played.workload.rate_rps, 3),
        "foreign_cores": played.foreign_cores,
        "probe_ms": played.probe_ms,
        "drag": drag_summary(played.drag),
        "measured": measured,
        "simulated": predicted,
        "errors": errors,
        "met": abs(errors["mean_s"]) <= MEAN_BAR and abs(errors["p99_s"]) <= P99_BAR,
        "happenings": [asdict(one) for one in played.happenings],
        "changes": {"measured": _changes(played), "simulated": [_change(one) for one in served.changes]},
        "laws": {
            f"{stages}x{shards}": _law(told.laws[stages, shards]) | quality(told.laws[stages, shards], stages, observed)
            for (stages, shards), observed in own.by_degrees().items()
        },
        TRACE: {
            "arrival_s": _rounded(served.arrival_s),
            "measured_s": _rounded(latency_s),
            "simulated_s": _rounded(served.latency_s),
        },
    }


def seeds(processors: int) -> range:
    """Of a run's simulations: one is enough where nobody ever stands still."""
    return range(_DRAWS if processors else 1)


def mean_of(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Figures by name, each the mean of all draws."""
    return {name: float(np.mean([one[name] for one in draws])) for name in draws[0]}


def _of(served: Served) -> dict[str, float]:
    return _summary(served.arrival_s, served.latency_s, served.first_s - served.arrival_s)


def _summary(arrival_s: Array, latency_s: Array, first_s: Array) -> dict[str, float]:
    whole = Outcome(arrival_s, arrival_s + latency_s, float("inf")).summary()
    first = Outcome(arrival_s, arrival_s + first_s, float("inf")).summary()
    return {
        "mean_s": whole.mean_s, "p50_s": whole.p50_s, "p90_s": whole.p90_s, "p99_s": whole.p99_s,
        "first_mean_s": first.mean_s, "first_p99_s": first.p99_s,
    }  # fmt: skip


def _changes(played: Played) -> list[dict[str, Any]]:
    """The changes of the real run, on its clock."""
    begun: dict[int, Event] = {}
    paused: dict[int, Event] = {}
    found = []
    for event in played.events:
        if event.kind == "reconfiguration_started":
            begun[event.data["epoch"]] = event
        elif event.kind == "reconfiguration_paused":
            paused[event.data["epoch"]] = event
        elif event.kind == "layout":
            epoch = event.data["epoch"]
            moments = (begun[epoch], paused.get(epoch, event), event)
            started_s, paused_s, done_s = (round(one.time_s - played.began_unix_s, 3) for one in moments)
            moved = event.data["requests_moved"] + event.data["requests_restored"]
            found.append({
                "started_s": started_s, "paused_s": paused_s, "done_s": done_s, "config": event.data["config"],
                "recovery": event.data["mode"] == "recovery", "moved": moved,
                "replayed": event.data["requests_replayed"],
            })  # fmt: skip
    return found


def _change(one: Any) -> dict[str, Any]:
    times = {key: round(getattr(one, key), 3) for key in ("started_s", "paused_s", "done_s")}
    return times | {
        "config": str(one.config), "recovery": one.recovery, "moved": one.moved, "replayed": one.replayed
    }  # fmt: skip


def _law(law: StepLaw) -> dict[str, Any]:
    return {
        "coefficients_ms": [float(f"{1e3 * value:.4g}") for value in law.coefficients],
        "slowness": [round(value, 3) for value in law.slowness],
        "overhead_ms": round(1e3 * law.overhead_s, 2),
    }


def _rounded(values: Array) -> list[float | None]:
    return [round(float(value), 4) if isfinite(value) else None for value in values]
