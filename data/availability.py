"""When instances come and go, and readers of the formats in which that is recorded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal

from data.errors import CorruptData, InvalidInput
from data.records import Record, csv_records, first_line, json_lines, load_json

FilePath = str | os.PathLike[str]
ChangeKind = Literal["add", "remove", "rate"]

SPOTSERVE_NOTICE_S = 30.0
_SKYPILOT_KEYS = ("kind", "nodes", "run", "zone", "instance")


@dataclass(frozen=True, slots=True)
class Change:
    """At `time_s` the instances become usable ("add") or disappear ("remove"), or the required rate
    becomes `value` requests per second ("rate"). It was announced `notice_s` before; 0 is a kill.
    """

    time_s: float
    kind: ChangeKind
    instances: tuple[str, ...] = ()
    notice_s: float = 0.0
    value: float = 0.0


@dataclass(frozen=True, slots=True)
class AvailabilityTrace:
    """Changes in order of time, from 0 to `duration_s`.

    Raises `InvalidInput` if a change is out of order, adds what is there or removes what is not.
    """

    name: str
    changes: tuple[Change, ...]
    duration_s: float

    def __post_init__(self) -> None:
        times = [0.0, *(change.time_s for change in self.changes), self.duration_s]
        if any(later < earlier for earlier, later in pairwise(times)):
            raise InvalidInput(f"the changes of trace {self.name} must be in order, within 0 … {self.duration_s:g} s")
        alive: set[str] = set()
        for change in self.changes:
            named = set(change.instances)
            wrong = named & alive if change.kind == "add" else named - alive
            if wrong or len(named) != len(change.instances):
                who = ", ".join(sorted(wrong or named))
                raise InvalidInput(f"trace {self.name} cannot {change.kind} {who} at {change.time_s:g} s")
            alive = alive | named if change.kind == "add" else alive - named

    @property
    def counts(self) -> tuple[tuple[float, int], ...]:
        """Usable instances from each time on: one entry per time of a change, starting at 0 s."""
        count, entries = 0, [(0.0, 0)]
        for time_s, group in groupby(self.changes, key=lambda change: change.time_s):
            count += sum(_delta(change) for change in group)
            entries.append((time_s, count))
        return tuple(entries[1:] if len(entries) > 1 and entries[1][0] == 0 else entries)

    @property
    def instance_minutes(self) -> float:
        """Time integral of the number of usable instances, in minutes."""
        starts = self.counts
        ends = [*(time_s for time_s, _ in starts[1:]), self.duration_s]
        return sum(count * (end - time_s) for (time_s, count), end in zip(starts, ends, strict=True)) / 60

    @property
    def least(self) -> int:
        """Fewest usable instances at any time."""
        return min(count for _, count in self.counts)

    @property
    def most(self) -> int:
        """Most usable instances at any time."""
        return max(count for _, count in self.counts)

    @property
    def zones(self) -> dict[str, AvailabilityTrace]:
        """The same for each zone that instances are named for (see `in_zone`); "" is that of the others."""
        named: dict[str, list[Change]] = {}
        for change in self.changes:
            for zone, group in groupby(sorted(change.instances, key=zone_of), key=zone_of):
                named.setdefault(zone, []).append(replace(change, instances=tuple(group)))
        return {zone: replace(self, changes=tuple(changes)) for zone, changes in sorted(named.items())}

    def usable(self, time_s: float) -> frozenset[str]:
        """Names of the instances that are usable at `time_s`, changes at that moment included."""
        alive: set[str] = set()
        for change in self.changes:
            if change.time_s > time_s:
                break
            alive = alive | set(change.instances) if change.kind == "add" else alive - set(change.instances)
        return frozenset(alive)


def in_zone(zone: str, instance: str) -> str:
    """The name of an instance in a zone; in none, its own."""
    return f"{zone}/{instance}" if zone else instance


def zone_of(instance: str) -> str:
    """The zone that an instance is named for; "" if its name has none."""
    return instance.rpartition("/")[0]


def joined(name: str, zones: Mapping[str, AvailabilityTrace]) -> AvailabilityTrace:
    """One trace of what was recorded in several zones together; each stays as it was last seen until all end."""
    end_s = max(trace.duration_s for trace in zones.values())
    changes = [
        replace(change, instances=tuple(in_zone(zone, one) for one in change.instances))
        for zone, trace in zones.items()
        for change in trace.changes
    ]
    return AvailabilityTrace(name, tuple(sorted(changes, key=lambda change: change.time_s)), end_s)


def read_availability(path: FilePath, **keys: str) -> dict[str, AvailabilityTrace]:
    """The traces of a file in any of the formats below, told apart by the first line.

    Of a table of many traces `keys` choose one, as for `read_skypilot`; `InvalidInput` where they do not.
    """
    start = first_line(path).lstrip("\ufeff").strip()
    if start.startswith("{"):
        return read_spotserve_cases(path)
    if "t_seconds" in start:
        trace = read_skypilot(path, **keys)
    else:
        trace = read_parcae(path) if "t_ms" in start else read_spotserve(path)
    return {trace.name: trace}


def read_spotserve(path: FilePath, *, notice_s: float = SPOTSERVE_NOTICE_S) -> AvailabilityTrace:
    """Event lines of SpotServe's recordings (Miao et al., ASPLOS 2024).

    A segment holds one JSON array per line, `[ms, "add"|"remove"|"other"|"DONE", {"nodes": […],
    "required_tpt": rate}]`; a full recording holds `ms,add|remove,node` lines. Every event is announced
    `notice_s` before. Raises `CorruptData` naming file and line.
    """
    segment = first_line(path).lstrip().startswith("[")
    return _trace(path, _stem(path), list(_segment_events(path) if segment else _recorded_events(path)), notice_s)


def read_spotserve_cases(path: FilePath, *, notice_s: float = SPOTSERVE_NOTICE_S) -> dict[str, AvailabilityTrace]:
    """The traces of a JSON file with `traces` → name → `events`, or of one with `events` alone.

    An event is `{t_s, op, nodes?, required_rps?}` with `op` add, remove, set_rate or end.
    """
    document = load_json(path)
    try:
        traces = document["traces"] if "traces" in document else {_stem(path): document}
        return {
            name: _trace(path, name, [_case_event(event) for event in trace["events"]], notice_s)
            for name, trace in traces.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(f"{path} does not hold traces with events: {error!r}") from error


def read_parcae(path: FilePath) -> AvailabilityTrace:
    """Counts over time, `t_ms,instances` (Duan et al., NSDI 2024); losses come without a notice."""
    points = [(record.number("t_ms") / 1e3, record.integer("instances")) for record in csv_records(path)]
    return _trace(path, _stem(path), list(_from_counts(points)), 0.0)


def read_skypilot(path: FilePath, **keys: str) -> AvailabilityTrace:
    """A trace of SkyPilot's change points (Wu et al., NSDI 2024), chosen by `kind`, `nodes`, `run`, `zone`
    and `instance`: columns of these names, `t_seconds` and `value`, the count from then on.

    What differs in its zone alone is one trace of several zones. Raises `InvalidInput` unless the keys given select
    exactly one.
    """
    unknown = set(keys) - set(_SKYPILOT_KEYS)
    if unknown:
        raise InvalidInput(f"{', '.join(sorted(unknown))} cannot select a trace; use {', '.join(_SKYPILOT_KEYS)}")
    chosen: dict[tuple[str, ...], list[tuple[float, int]]] = {}
    for record in csv_records(path):
        if all(record.fields.get(key) == value for key, value in keys.items()):
            identity = tuple(str(record.fields.get(key, "")) for key in _SKYPILOT_KEYS)
            chosen.setdefault(identity, []).append((record.number("t_seconds"), record.integer("value")))
    if len({_without_zone(identity) for identity in chosen}) != 1:
        some = "; ".join("/".join(identity) for identity in list(chosen)[:3])
        raise InvalidInput(f"{keys} selects {len(chosen)} traces of {path}{': ' + some if some else ''}; select one")
    traces = {
        identity: _trace(path, "/".join(identity), list(_from_counts(points)), 0.0)
        for identity, points in chosen.items()
    }
    identity, *others = traces
    if not others:
        return traces[identity]
    zone = _SKYPILOT_KEYS.index("zone")
    return joined("/".join(_without_zone(identity)), {one[zone]: trace for one, trace in traces.items()})


def _without_zone(identity: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for key, part in zip(_SKYPILOT_KEYS, identity, strict=True) if key != "zone")


# An event as all formats say it: seconds, operation, nodes, required rate if it changes.
Event = tuple[float, str, tuple[str, ...], float | None]


def _trace(path: FilePath, name: str, events: list[Event], notice_s: float) -> AvailabilityTrace:
    if not events:
        raise CorruptData(f"{path}, line 1: no events in this file")
    try:
        return AvailabilityTrace(name, tuple(_changes(events, notice_s)), events[-1][0])
    except InvalidInput as error:
        raise CorruptData(f"{path}: {error}") from error


def _changes(events: Iterable[Event], notice_s: float) -> Iterator[Change]:
    for time_s, operation, nodes, rate in events:
        notice = min(notice_s, time_s)
        if nodes:
            yield Change(time_s, "add" if operation == "add" else "remove", nodes, notice)
        if rate is not None:
            yield Change(time_s, "rate", (), notice, rate)


def _segment_events(path: FilePath) -> Iterator[Event]:
    for number, value in json_lines(path):
        try:
            time_ms, operation, details = value
            if operation not in ("add", "remove", "other", "DONE"):
                raise ValueError(f"unknown operation {operation!r}")
            nodes = tuple(str(node) for node in details.get("nodes", ()))
            rate = details.get("required_tpt")
            yield time_ms / 1e3, operation, nodes, None if rate is None else float(rate)
        except (TypeError, ValueError, AttributeError) as error:
            raise CorruptData(f"{path}, line {number}: not [ms, operation, details]: {error}") from error


def _recorded_events(path: FilePath) -> Iterator[Event]:
    """Rows of one time and operation are one event: the instances went together."""
    for (time_ms, operation), group in groupby(csv_records(path, names=("ms", "operation", "node")), key=_moment):
        yield time_ms / 1e3, operation, tuple(str(record.fields["node"]) for record in group), None


def _moment(record: Record) -> tuple[float, str]:
    operation = str(record.fields["operation"])
    if operation not in ("add", "remove"):
        record.reject(f"unknown operation {operation!r}; accepted: add, remove")
    return record.number("ms"), operation


def _case_event(event: Mapping[str, Any]) -> Event:
    if event["op"] not in ("add", "remove", "set_rate", "end"):
        raise ValueError(f"unknown operation {event['op']!r}")
    nodes = tuple(f"node-{node}" for node in event.get("nodes", ()))
    rate = event.get("required_rps")
    return float(event["t_s"]), str(event["op"]), nodes, None if rate is None else float(rate)


def _from_counts(points: Iterable[tuple[float, int]]) -> Iterator[Event]:
    """Events that give these counts; counts do not say which instance goes, so the newest does."""
    alive: list[str] = []
    born = 0
    for time_s, count in points:
        new = [f"node-{born + index}" for index in range(max(0, count - len(alive)))]
        gone = alive[count:]
        born, alive = born + len(new), alive[:count] + new
        yield time_s, "add" if new else "remove", tuple(new or gone), None


def _delta(change: Change) -> int:
    return {"add": 1, "remove": -1, "rate": 0}[change.kind] * len(change.instances)


def _stem(path: FilePath) -> str:
    return Path(path).name.removesuffix(".gz").rsplit(".", 1)[0]
