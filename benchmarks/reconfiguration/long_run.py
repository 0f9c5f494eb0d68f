"""The CPU fleet: many planned changes and many kills in one run, for percentiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import numpy as np

from benchmarks.reconfiguration.change import Moments
from benchmarks.reconfiguration.crash import Kill, strike, told, working
from benchmarks.reconfiguration.options import replication
from benchmarks.reconfiguration.planned import Report
from benchmarks.reconfiguration.stage import Bench, Stage, stage
from benchmarks.reconfiguration.timeline import continuity, longest_s, quantiles_ms, stall_s, step_s
from perennial.testing import LADDER
from serving.requests import Event

_INSTANCES = 4
_ROUND = ("1x1x2", "1x3x1", "1x1x1", "2x1x2", "1x4x1", "1x2x1", "2x2x1", "1x2x2")


@dataclass(slots=True)
class _Seen:
    """Seconds, gathered over the run."""

    steps: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # the longest of any request at the switch
    preparing: list[float] = field(default_factory=list)  # and before it
    joins: list[float] = field(default_factory=list)  # pauses of changes because an instance came
    stalls: list[float] = field(default_factory=list)
    bystanders: list[float] = field(default_factory=list)
    prepared: list[float] = field(default_factory=list)


async def measure(bench: Bench, report: Report) -> None:
    """`changes` planned changes, then `kills` kills, each followed by a new instance."""
    options, found = bench.options, _Seen()
    settings = replication(enabled=True) or {}
    requests = options.requests
    async with stage(
        bench, "fleet", instances=_INSTANCES, layouts=dict(LADDER), requests=requests, batch=requests, **settings
    ) as play:
        for number, layout in enumerate(islice(cycle(_ROUND), options.changes), start=1):
            await _change(play, layout, found)
            bench.say(f"change {number} of {options.changes}, to {layout}: pause {1e3 * found.pauses[-1]:.1f} ms")
        await play.adopt(LADDER)
        await play.settle()
        for number in range(1, options.kills + 1):
            kill, joined = await _kill(play, number, found)
            noticed_ms = told(kill, play.offset_s)["noticed_ms"]
            report(_kill_record(number, kill, found, joined) | {"noticed_ms": noticed_ms})
        lost, duplicated = continuity(play.load.timelines)
        errors = list(play.load.errors)
    report(_summary(found, lost, duplicated, errors, replicated=bool(settings)))


async def _change(play: Stage, layout: str, found: _Seen) -> None:
    before = await play.watch(play.bench.options.before_s)
    found.steps.append(step_s(play.load.recent(before[0]), *before))
    events = await play.change(_INSTANCES, layout)
    moments = Moments.of(events, play.offset_s)
    await play.watch(play.bench.options.before_s)
    timelines = play.load.recent(before[0])
    found.gaps.append(longest_s(timelines, moments.paused_s, moments.in_force_s))
    found.preparing.append(longest_s(timelines, moments.started_s, moments.paused_s))
    found.pauses.append(pause_s(events[-1]))
    found.prepared.append(events[-1].data["seconds"]["prepare"])


def pause_s(layout: Event) -> float:
    """From the order to pause until the next layout runs."""
    seconds = layout.data["seconds"]
    return float(seconds["pause"] + seconds["transfer"])


async def _kill(play: Stage, number: int, found: _Seen) -> tuple[Kill, Sequence[Event]]:
    options = play.bench.options
    before = await play.watch(options.before_s)
    victim = await working(play, number)
    kill = await strike(play, victim)
    await play.watch(options.before_s)
    affected, others = kill.split(play.load.recent(before[0]))
    found.steps.append(step_s(play.load.recent(before[0]), *before))
    stalls = [stall_s(one, kill.at_s, kill.until_s) for one in affected]
    found.stalls += stalls
    found.bystanders += [longest_s([one], kill.at_s, kill.until_s) for one in others]
    first = len(play.service.events)
    await play.service.add()
    await play.settle()
    joined = [event for event in play.service.events[first:] if event.kind == "layout"]
    found.joins += [pause_s(event) for event in joined]
    longest_ms = 1e3 * max(stalls, default=0.0)
    play.bench.say(
        f"kill {number} of {options.kills}, {victim}: {len(affected)} requests stall {longest_ms:.0f} ms at most"
    )
    return kill, joined


def _kill_record(number: int, kill: Kill, found: _Seen, joined: Sequence[Event]) -> dict[str, Any]:
    recoveries = [event.data for event in kill.events if event.kind == "layout"]
    return {
        "case": "fleet",
        "name": f"kill {number}",
        "affected": len(kill.affected),
        "longest_stall_ms": quantiles_ms(found.stalls[-max(1, len(kill.affected)) :]).get("max"),
        "recovery_ms": [{name: round(1e3 * at, 1) for name, at in one["seconds"].items()} for one in recoveries],
        "requests_replayed": sum(one.get("requests_replayed", 0) for one in recoveries),
        "requests_restored": sum(one.get("requests_restored", 0) for one in recoveries),
        "tokens_reexecuted": [count for one in recoveries for count in one.get("tokens_reexecuted", ())],
        "join_pause_ms": [round(1e3 * pause_s(event), 1) for event in joined],
    }


def _summary(found: _Seen, lost: int, duplicated: int, errors: Sequence[str], *, replicated: bool) -> dict[str, Any]:
    step = float(np.nanmedian(found.steps)) if found.steps else float("nan")
    return {
        "case": "fleet",
        "name": "summary",
        "replication": replicated,
        "step_ms": round(1e3 * step, 2),
        "changes": len(found.pauses),
        "prepare_ms": quantiles_ms(found.prepared),
        "pause_ms": quantiles_ms(found.pauses),
        "gap_ms": quantiles_ms(found.gaps),
        "preparing_gap_ms": quantiles_ms(found.preparing),
        "stalled_requests": len(found.stalls),
        "stall_ms": quantiles_ms(found.stalls),
        "bystander_gap_ms": quantiles_ms(found.bystanders),
        "join_pause_ms": quantiles_ms(found.joins),
        "lost_tokens": lost,
        "duplicated_tokens": duplicated,
        "errors": list(errors),
    }
