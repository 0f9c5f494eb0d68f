"""Reading reconfigurations and recoveries out of a controller's events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perennial.recording import ActionRecord, EventRecord, Recording

_CAUSES = {
    "notice": "got a notice",
    "instance_joined": "joined",
    "instance_lost": "lost",
    "plan_loaded": "new plan book",
    "capacity_returned": "capacity returned",
}
_LOSSES = ("worker_lost", "instance_lost", "replica_failed")


@dataclass(frozen=True, slots=True)
class Reconfiguration:
    """One change of layout. Times are seconds since the recording began.

    `stopped_s` is how long affected replicas did not decode (pause + transfer);
    `stall_s` the longest silence that any stream saw across the switch, None if none was running.
    """

    epoch: int
    started_s: float
    in_force_s: float
    mode: str
    reason: str
    source: str
    target: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    moved: Mapping[str, int] = field(default_factory=dict)
    requests_moved: int = 0
    requests_restored: int = 0
    requests_replayed: int = 0
    stall_s: float | None = None

    @property
    def stopped_s(self) -> float:
        """Pause and transfer together."""
        return sum(float(self.seconds.get(phase, 0.0)) for phase in ("pause", "transfer"))


@dataclass(frozen=True, slots=True)
class Recovery:
    """One loss without a completed plan for it, by four clocks, each in seconds from the loss.

    `detected_s` the controller knew, `restored_s` the next layout was in force, `served_s` the first
    token after that reached a client that was waiting, `stall_s` the longest silence that any stream saw meanwhile.
    """

    lost_s: float
    detected_s: float
    restored_s: float
    served_s: float | None
    stall_s: float | None


def layouts(events: Iterable[EventRecord]) -> list[EventRecord]:
    """The `layout` events in time order: when which layout came into force."""
    return sorted((event for event in events if event.kind == "layout"), key=lambda event: event.time_s)


def config_label(config: Any) -> str:
    """`D2·P1·T2` of a configuration given as JSON fields or as text."""
    if isinstance(config, Mapping):
        return f"D{config.get('replicas', '?')}·P{config.get('stages', '?')}·T{config.get('shards', '?')}"
    return str(config or "none").split("·B")[0]


def shape(config: Any) -> tuple[str, str]:
    """(stages, shards) of a configuration, as text."""
    parts = {part[:1]: part[1:] for part in config_label(config).split("·")}
    return parts.get("P", ""), parts.get("T", "")


def reconfigurations(recording: Recording) -> list[Reconfiguration]:
    """Every change of layout after the first one."""
    events, in_force = recording.events, layouts(recording.events)
    result, previous = [], in_force[0] if in_force else None
    for event in in_force[1:]:
        started = _started(events, event)
        data = started.data if started else {}
        result.append(
            Reconfiguration(
                epoch=int(event.data.get("epoch", 0)),
                started_s=started.time_s if started else event.time_s,
                in_force_s=event.time_s,
                mode=str(event.data.get("mode") or data.get("mode", "planned")),
                reason=str(data.get("reason") or _because(events, previous, event)),
                source=config_label(previous.data.get("config")) if previous else "none",
                target=config_label(event.data.get("config")),
                seconds=event.data.get("seconds", {}),
                moved=event.data.get("moved", {}),
                requests_moved=_count(event.data.get("requests_moved")),
                requests_restored=_count(event.data.get("requests_restored")),
                requests_replayed=_count(event.data.get("requests_replayed")),
                stall_s=longest_gap(recording, started.time_s if started else event.time_s, event.time_s),
            )
        )
        previous = event
    return result


def recoveries(recording: Recording) -> list[Recovery]:
    """Every stretch from a loss that broke a replica to the layout that mended it."""
    result = []
    for change in reconfigurations(recording):
        if change.mode != "recovery":
            continue
        losses = [event for event in recording.events if event.kind in _LOSSES and event.time_s <= change.in_force_s]
        since = max((item.time_s for item in layouts(recording.events) if item.time_s < change.in_force_s), default=0.0)
        fresh = [event.time_s for event in losses if event.time_s >= since]
        detected_s = min(fresh, default=change.started_s)
        lost_s = _cause(recording.actions, since, detected_s)
        waiting = [stream for stream in recording.streams if stream.submitted_s <= change.in_force_s]
        served = [time_s for stream in waiting for time_s in stream.times_s if time_s > change.in_force_s]
        result.append(
            Recovery(
                lost_s=lost_s,
                detected_s=detected_s - lost_s,
                restored_s=change.in_force_s - lost_s,
                served_s=min(served) - lost_s if served else None,
                stall_s=longest_gap(recording, lost_s, change.in_force_s),
            )
        )
    return result


def longest_gap(recording: Recording, start_s: float, end_s: float) -> float | None:
    """The longest silence between two tokens of one stream that touches [start, end]."""
    gaps = [
        after - before
        for stream in recording.streams
        for before, after in zip(stream.times_s, stream.times_s[1:], strict=False)
        if before <= end_s and after >= start_s
    ]
    return max(gaps, default=None)


def _started(events: Sequence[EventRecord], layout: EventRecord) -> EventRecord | None:
    """The first start of the work that led to this layout (failed attempts before it included)."""
    since = max((event.time_s for event in layouts(events) if event.time_s < layout.time_s), default=-1.0)
    starts = [
        event for event in events if event.kind == "reconfiguration_started" and since <= event.time_s <= layout.time_s
    ]
    same = [event for event in starts if event.data.get("epoch") == layout.data.get("epoch")]
    return next(iter(same or starts), None)


def _cause(actions: Iterable[ActionRecord], since_s: float, detected_s: float) -> float:
    """When the process that was found dead had been killed, if the driver did it."""
    kills = [action.time_s for action in actions if action.kind == "kill" and since_s <= action.time_s <= detected_s]
    return max(kills, default=detected_s)


def _because(events: Iterable[EventRecord], previous: EventRecord | None, layout: EventRecord) -> str:
    """What happened to the fleet since the layout before."""
    since = previous.time_s if previous else -1.0
    happened = [
        f"{event.data.get('instance', '')} {_CAUSES[event.kind]}".strip()
        for event in events
        if event.kind in _CAUSES and since < event.time_s <= layout.time_s
    ]
    return ", ".join(dict.fromkeys(happened))


def _count(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) else int(value or 0)
