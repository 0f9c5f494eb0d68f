"""What a simulation of serving on a fleet that changes takes and gives, whatever the policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import inf

import numpy as np
import numpy.typing as npt

from data.availability import AvailabilityTrace, Change, ChangeKind

Array = npt.NDArray[np.float64]

GRACE_S = 30.0
DRAIN_S = 4 * 3600.0  # after the end of a trace what arrived before it is served on what is left


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """At `time_s` instances come and go, known `GRACE_S` before; `rate_rps` replaces the required rate."""

    time_s: float
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    rate_rps: float | None = None

    @property
    def notice_s(self) -> float:
        """When it becomes known."""
        return self.time_s - GRACE_S


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of what serves: when the old stopped and the new was ready, and what moved between instances."""

    time_s: float
    stop_s: float
    ready_s: float
    shape: tuple[int, int, int]
    moved_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    """Latency in seconds; requests that were never finished are infinitely late."""

    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    requests: int
    unfinished: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Arrivals before the end of the trace, when each was done (infinite: never), and the changes."""

    arrival_s: Array
    done_s: Array
    duration_s: float
    transitions: tuple[Transition, ...] = ()
    usd: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def latency_s(self) -> Array:
        """Seconds from arrival to the last token, in order of arrival."""
        return self.done_s - self.arrival_s

    def summary(self, *, completed_only: bool = False) -> Summary:
        """Over all requests that arrived before the end, or, as published, over those done by then."""
        done = self.done_s <= self.duration_s
        taken = np.sort(self.latency_s[done] if completed_only else self.latency_s)
        late = int((~done).sum())
        if not len(taken):
            return Summary(inf, inf, inf, inf, 0, late)
        p50, p90, p99 = (float(taken[min(int(len(taken) * share), len(taken) - 1)]) for share in (0.5, 0.9, 0.99))
        return Summary(float(taken.mean()), p50, p90, p99, len(taken), late)


def events_of(trace: AvailabilityTrace) -> tuple[FleetEvent, ...]:
    """The changes of a trace, those of one moment and kind in one event, losses after additions."""
    found = []
    for time_s, group in groupby(trace.changes, key=lambda change: change.time_s):
        changes = list(group)
        kinds: list[ChangeKind] = list(dict.fromkeys(change.kind for change in changes if change.kind != "rate"))
        rate = next((change.value for change in changes if change.kind == "rate"), None)
        for kind in kinds or ["rate"]:
            names = tuple(name for change in changes if change.kind == kind for name in change.instances)
            found.append(FleetEvent(time_s, names if kind == "add" else (), names if kind == "remove" else (), rate))
    return tuple(found)


def constant(instances: int, duration_s: float) -> AvailabilityTrace:
    """A fleet that never changes."""
    names = tuple(f"node-{index}" for index in range(instances))
    return AvailabilityTrace(f"{instances} instances", (Change(0.0, "add", names),), duration_s)


def merged(events: Iterable[FleetEvent]) -> tuple[FleetEvent, ...]:
    """As SpotServe's scheduler sees them: a loss within the grace after an addition belongs to the addition."""
    found: list[FleetEvent] = []
    for event in events:
        last = found[-1] if found else None
        if last and last.added and not last.removed and event.removed and event.time_s - last.time_s <= GRACE_S:
            rate = event.rate_rps if event.rate_rps is not None else last.rate_rps
            found[-1] = FleetEvent(last.time_s, last.added, event.removed, rate)
        else:
            found.append(event)
    return tuple(found)


def before(arrival_s: Sequence[float] | Array, end_s: float) -> Array:
    """The arrivals before `end_s`."""
    times = np.asarray(arrival_s, dtype=np.float64)
    return times[times < end_s]
