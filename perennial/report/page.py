"""The report as one HTML file: template, style, script and data inlined; nothing is fetched."""

from __future__ import annotations

import json
from importlib import resources
from itertools import zip_longest
from typing import Any

from flows.pages import BRAND, style
from perennial.recording import Recording
from perennial.report.lanes import instance_lanes
from perennial.report.reconfigurations import config_label, reconfigurations, recoveries
from perennial.report.summary import difference, failures, latencies_s, summary


def render(recording: Recording) -> str:
    """The whole page. Self-contained, for light and dark displays."""
    page = _asset("template.html")
    for mark, text in (
        ("/*STYLE*/", style()),
        ("<!--BRAND-->", BRAND),
        ("/*SCRIPT*/", _asset("charts.js") + _asset("report.js")),
        ("{}/*DATA*/", _embed(_payload(recording))),
    ):
        page = page.replace(mark, text)
    return page


def _asset(name: str) -> str:
    return resources.files("perennial.report").joinpath(name).read_text(encoding="utf-8")


def _embed(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _payload(recording: Recording) -> dict[str, Any]:
    numbers = summary(recording)
    return {
        "title": recording.title,
        "seed": recording.seed,
        "duration": round(recording.duration_s, 3),
        "summary": numbers,
        "failures": failures(numbers),
        "layouts": _layout_blocks(recording),
        "reconfigurations": [_change(change) for change in reconfigurations(recording)],
        "recoveries": [_mend(mend) for mend in recoveries(recording)],
        "instances": instance_lanes(recording),
        "actions": [
            {"t": round(action.time_s, 3), "kind": action.kind, "instance": action.instance, "grace": action.grace_s}
            for action in recording.actions
        ],
        "streams": _streams(recording),
        "latency": {name: [round(value * 1e3, 2) for value in values] for name, values in _thinned(recording).items()},
        "plan": [
            {
                "state": point.state,
                "instances": point.instances,
                "config": point.config,
                "latency": point.latency_s,
                "throughput": point.throughput_rps,
                "reason": point.reason,
            }
            for point in recording.plan
        ],
        "facts": recording.facts,
    }


def _layout_blocks(recording: Recording) -> list[dict[str, Any]]:
    """Which layout was in force from when to when; `no_capacity` ends one early."""
    marks = [event for event in recording.events if event.kind in ("layout", "no_capacity")]
    marks.sort(key=lambda event: event.time_s)
    blocks = []
    for event, after in zip_longest(marks, marks[1:]):
        if event.kind == "layout":
            blocks.append(
                {
                    "from": round(event.time_s, 3),
                    "to": round(after.time_s if after else recording.duration_s, 3),
                    "epoch": event.data.get("epoch"),
                    "config": config_label(event.data.get("config")),
                    "positions": event.data.get("positions", []),
                }
            )
    return blocks


def _change(change: Any) -> dict[str, Any]:
    return {
        "epoch": change.epoch,
        "started": round(change.started_s, 3),
        "at": round(change.in_force_s, 3),
        "mode": change.mode,
        "reason": change.reason,
        "from": change.source,
        "to": change.target,
        "seconds": dict(change.seconds),
        "moved": dict(change.moved),
        "stopped": round(change.stopped_s * 1e3, 1),
        "stall": None if change.stall_s is None else round(change.stall_s * 1e3, 1),
        "requestsMoved": change.requests_moved,
        "requestsRestored": change.requests_restored,
        "requestsReplayed": change.requests_replayed,
    }


def _mend(mend: Any) -> dict[str, Any]:
    return {
        "at": round(mend.lost_s, 3),
        "detected": round(mend.detected_s * 1e3, 1),
        "restored": round(mend.restored_s * 1e3, 1),
        "served": None if mend.served_s is None else round(mend.served_s * 1e3, 1),
        "stall": None if mend.stall_s is None else round(mend.stall_s * 1e3, 1),
    }


def _streams(recording: Recording) -> list[dict[str, Any]]:
    return [
        {
            "id": stream.request_id,
            "at": round(stream.submitted_s, 3),
            "prompt": stream.prompt_tokens,
            "temperature": stream.temperature,
            "times": [round(time_s, 3) for time_s in stream.times_s],
            "ok": not difference(stream) and not stream.error,
            "error": stream.error,
        }
        for stream in sorted(recording.streams, key=lambda stream: stream.submitted_s)
    ]


def _thinned(recording: Recording, most: int = 4000) -> dict[str, list[float]]:
    """Sorted latencies, evenly thinned so that the page stays small."""
    result = {}
    for name, values in latencies_s(recording).items():
        ordered = sorted(values)
        step = max(1, len(ordered) / most)
        result[name] = [ordered[int(index * step)] for index in range(int(len(ordered) / step))]
    return result
