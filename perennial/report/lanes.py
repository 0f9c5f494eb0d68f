"""The life of every instance as the timeline draws it."""

from __future__ import annotations

from typing import Any

from perennial.recording import EventRecord, Recording

_ENDS = {"instance_lost": "lost", "instance_dismissed": "dismissed"}


def instance_lanes(recording: Recording) -> list[dict[str, Any]]:
    """One record per instance: from when to when, since when leaving, and how it ended."""
    lanes: dict[str, dict[str, Any]] = {}
    for event in sorted(recording.events, key=lambda event: event.time_s):
        name = event.data.get("instance")
        if event.kind == "instance_joined":
            lanes.setdefault(str(name), _lane(str(name), event))
        elif name in lanes and event.kind == "notice":
            lanes[name]["leaving"] = round(event.time_s, 3)
        elif name in lanes and event.kind in _ENDS and lanes[name]["end"] == "":
            lanes[name] |= {"to": round(event.time_s, 3), "end": _ENDS[event.kind]}
    for action in recording.actions:
        if action.kind == "kill" and action.instance in lanes:
            lanes[action.instance] |= {"to": round(action.time_s, 3), "end": "killed"}
    for lane in lanes.values():
        if not lane["end"]:
            lane["to"] = round(recording.duration_s, 3)
    return sorted(lanes.values(), key=lambda lane: (lane["from"], lane["name"]))


def _lane(name: str, event: EventRecord) -> dict[str, Any]:
    return {"name": name, "type": event.data.get("type", ""), "from": max(0.0, round(event.time_s, 3)), "end": ""}
