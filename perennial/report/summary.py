"""The numbers of a run, as `--json` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from perennial.comparison import Difference, agreement, compare
from perennial.recording import Recording, StreamRecord
from perennial.report.reconfigurations import layouts, reconfigurations, recoveries, shape

DEFINITIONS = {
    "pauses_ms": "per planned reconfiguration: how long the affected replicas did not decode",
    "recoveries_ms": "per recovery: from the loss to the first token of a waiting stream under the mended layout",
    "recovery_clocks_ms": "from the loss: known to the controller, layout in force, first token; and the longest stall",
    "stalls_ms": "per reconfiguration: the longest silence between two tokens of any one stream across it",
    "cost_model_error": "relative error of the fitted cost model on points held out of the fit",
    "agreement": "share of the undisturbed tokens delivered before a stream first differs",
}


def quantiles(values: Sequence[float], *, scale: float = 1.0, digits: int = 1) -> dict[str, float | None]:
    """`p50`, `p99` and `max` of `values` times `scale`; None when there are none."""
    if not values:
        return {"p50": None, "p99": None, "max": None}
    p50, p99 = np.percentile(np.asarray(values) * scale, [50, 99])
    return {
        "p50": round(float(p50), digits),
        "p99": round(float(p99), digits),
        "max": round(max(values) * scale, digits),
    }


def difference(stream: StreamRecord) -> Difference:
    """How the stream differs from its undisturbed run."""
    return compare(stream.expected, list(zip(stream.positions, stream.tokens, strict=True)))


def latencies_s(recording: Recording) -> dict[str, list[float]]:
    """Seconds to the first token, between tokens, and to the end, over all streams."""
    started = [stream for stream in recording.streams if stream.times_s]
    return {
        "ttft": [stream.times_s[0] - stream.submitted_s for stream in started],
        "inter_token": [
            after - before
            for stream in started
            for before, after in zip(stream.times_s, stream.times_s[1:], strict=False)
        ],
        "end_to_end": [stream.times_s[-1] - stream.submitted_s for stream in started],
    }


def summary(recording: Recording) -> dict[str, Any]:
    """Counts, correctness and latency of a run, ready for JSON."""
    changes, mends = reconfigurations(recording), recoveries(recording)
    kinds = [action.kind for action in recording.actions]
    planned = [change.stopped_s for change in changes if change.mode != "recovery"]
    return {
        **_correctness(recording),
        "notices": kinds.count("notice"),
        "kills": kinds.count("kill"),
        "additions": kinds.count("add"),
        "reconfigurations": len(changes),
        "recoveries": len(mends),
        "layouts": _layout_labels(recording),
        "plan_version": recording.plan_version,
        "plan_sha256": recording.plan_sha256,
        "cost_model_error": {name: recording.cost_model_error.get(name) for name in ("median", "p90")},
        "pauses_ms": quantiles(planned, scale=1e3),
        "recoveries_ms": quantiles([mend.served_s or mend.restored_s for mend in mends], scale=1e3),
        "recovery_clocks_ms": {
            "detected": quantiles([mend.detected_s for mend in mends], scale=1e3),
            "restored": quantiles([mend.restored_s for mend in mends], scale=1e3),
            "served": quantiles([mend.served_s for mend in mends if mend.served_s is not None], scale=1e3),
            "stall": quantiles([mend.stall_s for mend in mends if mend.stall_s is not None], scale=1e3),
        },
        "stalls_ms": quantiles([change.stall_s for change in changes if change.stall_s is not None], scale=1e3),
        "latency_ms": {name: quantiles(values, scale=1e3) for name, values in latencies_s(recording).items()},
        "tokens_per_s": round(sum(len(stream.tokens) for stream in recording.streams) / recording.duration_s, 1),
        "duration_s": round(recording.duration_s, 2),
        "seed": recording.seed,
        "leftover_processes": recording.leftovers,
        "facts": recording.facts,
        "machine": recording.machine,
        "definitions": DEFINITIONS,
    }


def _correctness(recording: Recording) -> dict[str, Any]:
    differences = [difference(stream) for stream in recording.streams]
    total = sum(differences, Difference())
    return {
        "requests": len(recording.streams),
        "tokens": sum(len(stream.tokens) for stream in recording.streams),
        "lost_tokens": total.lost,
        "duplicated_tokens": total.duplicated,
        "mismatched_streams": sum(bool(item.mismatched) for item in differences),
        "mismatched_tokens": total.mismatched,
        "failed_streams": sum(bool(stream.error) for stream in recording.streams),
        "agreement": _agreement(recording),
        "exact": recording.exact,
    }


def _agreement(recording: Recording) -> float | None:
    shares = [agreement(stream.expected, stream.tokens) for stream in recording.streams]
    return round(float(np.mean(shares)), 4) if shares else None


def _layout_labels(recording: Recording) -> dict[str, Any]:
    shapes = [shape(event.data.get("config")) for event in layouts(recording.events)]
    return {
        "stages": sorted({stages for stages, _ in shapes}),
        "shards": sorted({shards for _, shards in shapes}),
    }


def failures(numbers: dict[str, Any]) -> list[str]:
    """Why a run did not hold, one sentence each; empty when it did."""
    found = []
    for key in ("lost_tokens", "duplicated_tokens", "failed_streams"):
        if numbers[key]:
            found.append(f"{numbers[key]} {key.replace('_', ' ')}")
    if numbers["exact"] and numbers["mismatched_streams"]:
        found.append(f"{numbers['mismatched_streams']} streams differ from the undisturbed run")
    if numbers["leftover_processes"]:
        found.append(f"processes left behind: {', '.join(numbers['leftover_processes'])}")
    return found
