"""Fleets made from others: no more than so many instances, or on-demand ones where spot ones are missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data.availability import AvailabilityTrace, Change

_OVERLAP_S = 60.0  # for which a stand-in stays beside the spot instance that takes over


def capped(trace: AvailabilityTrace, most: int, launch_s: float = 120.0) -> AvailabilityTrace:
    """No more than `most` instances are taken; a lost one is replaced `launch_s` after its notice, if there is one."""
    there: list[str] = []
    taken: list[str] = []
    changes: list[Change] = []
    for change in trace.changes:
        if change.kind == "add":
            there += change.instances
            when = change.time_s
        else:
            gone = tuple(name for name in change.instances if name in taken)
            there = [name for name in there if name not in change.instances]
            taken = [name for name in taken if name not in gone]
            if gone:
                changes.append(replace(change, instances=gone))
            when = max(change.time_s, change.time_s - change.notice_s + launch_s)
        new = tuple(name for name in there if name not in taken)[: max(most - len(taken), 0)]
        if new and when < trace.duration_s:
            taken += new
            changes.append(Change(when, "add", new, 30.0 if when else 0.0))
    return _tidy(trace, most, changes)


def _tidy(trace: AvailabilityTrace, most: int, changes: list[Change]) -> AvailabilityTrace:
    """In order of time; an instance that is gone before it would have been ready is never taken."""
    ordered = sorted(changes, key=lambda change: (change.time_s, change.kind == "add"))
    up: set[str] = set()
    kept: list[Change] = []
    ended = {name: change.time_s for change in trace.changes if change.kind == "remove" for name in change.instances}
    for change in ordered:
        if change.kind == "add":
            names = tuple(name for name in change.instances if ended.get(name, np.inf) > change.time_s)
            up |= set(names)
        else:
            names = tuple(name for name in change.instances if name in up)
            up -= set(names)
        if names:
            kept.append(replace(change, instances=names))
    return AvailabilityTrace(f"{trace.name}, at most {most}", tuple(kept), trace.duration_s)


def with_fallback(trace: AvailabilityTrace, wanted: int, launch_s: float = 120.0) -> tuple[AvailabilityTrace, float]:
    """On-demand instances stand in for missing spot ones, `launch_s` after the loss is known, until they have returned.

    Returns the trace with them and their instance-seconds.
    """
    changes = [change for change in trace.changes if change.kind != "rate"]
    hired, spent, number = list[tuple[float, str]](), 0.0, 0
    for time_s, count in trace.counts:
        while len(hired) > max(wanted - count, 0):
            since, name = hired.pop()
            end_s = min(time_s + _OVERLAP_S, trace.duration_s)
            if since < end_s:
                changes.append(Change(end_s, "remove", (name,), 30.0))
                spent += end_s - since
            else:
                changes = [change for change in changes if change.instances != (name,)]
        while len(hired) < wanted - count:
            number += 1
            ready_s = max(time_s - 30.0 + launch_s, 0.0) if time_s else 0.0
            if ready_s >= trace.duration_s:
                hired.append((trace.duration_s, ""))
                continue
            hired.append((ready_s, f"on-demand-{number}"))
            changes.append(Change(ready_s, "add", (f"on-demand-{number}",), 30.0 if ready_s else 0.0))
    spent += sum(max(trace.duration_s - since, 0.0) for since, _ in hired)
    ordered = sorted(changes, key=lambda change: (change.time_s, change.kind != "add"))
    return AvailabilityTrace(f"{trace.name} with on-demand", tuple(ordered), trace.duration_s), spent
