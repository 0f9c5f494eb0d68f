"""Instances that are killed while requests run: how long whose tokens stay away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reconfiguration.change import Quiet, clocks
from benchmarks.reconfiguration.options import replication
from benchmarks.reconfiguration.planned import Report, controller_says
from benchmarks.reconfiguration.stage import Bench, Stage, copies_s, stage
from benchmarks.reconfiguration.timeline import Timeline, continuity, longest, longest_s, stall_s, step_s
from data.layout import Device
from serving.requests import Event

_BROKEN_S = 30.0
_EARLIER_S = 1e-6
_INSTANCES = 4
_STOPPED_S = 0.025
_LAYOUTS = {2: "1x1x2", 3: "1x1x2", 4: "2x1x2"}


@dataclass(frozen=True, slots=True)
class Kill:
    """What followed a kill: when it was, when all had settled and went on, and whose replica it hit."""

    at_s: float
    until_s: float
    affected: tuple[str, ...]
    events: tuple[Event, ...]

    def split(self, timelines: Sequence[Timeline]) -> tuple[list[Timeline], list[Timeline]]:
        """The requests under way then: those whose replica broke, and the others."""
        under_way = [one for one in timelines if one.spans(self.at_s)]
        return (
            [one for one in under_way if one.request_id in self.affected],
            [one for one in under_way if one.request_id not in self.affected],
        )


async def strike(play: Stage, victim: Device, *, stopped_s: float = 0.0) -> Kill:
    """Kill the instance of a device that works, and wait until the fleet serves on without it, every request too.

    If it is stopped for a few steps before, the devices of its peers are waiting for it when it dies.
    """
    service, first = play.service, len(play.service.events)
    if stopped_s:
        service.suspend(victim.instance)
        await asyncio.sleep(stopped_s)
    at = time.monotonic()
    await service.kill(victim.instance)
    broken = await service.wait_event(lambda event: event.kind == "replica_failed", since=first, timeout_s=_BROKEN_S)
    await play.settle()
    affected = tuple(broken.data["requests"])
    if not await play.load.resumed(affected, broken.time_s - play.offset_s, timeout_s=_BROKEN_S):
        play.bench.say(f"some of {len(affected)} requests did not go on within {_BROKEN_S:g} s")
    return Kill(at, time.monotonic(), affected, tuple(service.events[first:]))


async def measure(bench: Bench, report: Report) -> None:
    """Two replicas of two shards; one loses a rank, the other serves on. Every second victim is stopped first: the
    device of a leader whose follower is stopped waits in a step.
    """
    options = bench.options
    if options.gpus < 2:
        report({"case": "kill", "name": "TP2", "skipped": f"two shards need 2 GPUs, here is {options.gpus}"})
        return
    settings = replication(enabled=True) or {}
    async with stage(
        bench,
        "kill",
        instances=_INSTANCES,
        layouts=_LAYOUTS,
        requests=options.requests,
        batch=options.requests,
        **settings,
    ) as play:
        for number in range(options.kills):
            stopped_s = _STOPPED_S * (number % 2)
            rank = 1 - number // 2 % 2
            report(await _one(play, rank=rank, replicated=bool(settings), stopped_s=stopped_s))
            if number + 1 < options.kills:
                play.service.launch()
                await play.settle()
                await play.load.renew(timeout_s=_BROKEN_S * 8)


async def _one(play: Stage, *, rank: int, replicated: bool, stopped_s: float) -> dict[str, Any]:
    options, load = play.bench.options, play.load
    victim = await working(play, rank)
    await play.watch(copies_s(play.bench, options.requests, options.context))
    before = await play.watch(options.before_s)
    kill = await strike(play, victim, stopped_s=stopped_s)
    after = await play.watch(options.after_s)
    timelines = load.recent(before[0])
    affected, others = kill.split(timelines)
    quiet = Quiet(before, (max(after[0], after[1] - options.before_s), after[1]))
    step = step_s(timelines, *before)
    stalls = [stall_s(one, kill.at_s, kill.until_s) for one in affected]
    worst = longest(others, kill.at_s, after[1])
    worst_s = worst.length_s if worst else 0.0
    lost, duplicated = continuity(timelines)
    return {
        "case": "kill",
        "name": f"kill -9 of rank {rank} of a TP2 replica{', stopped before' if stopped_s else ''}",
        "replication": replicated,
        "stopped_ms": _ms(stopped_s),
        "affected": len(affected),
        "others": len(others),
        "step_ms": round(1e3 * step, 2),
        "stall_ms": {"shortest": _ms(min(stalls, default=0.0)), "longest": _ms(max(stalls, default=0.0))},
        "others_gap_ms": _ms(worst_s),
        "others_gap_at_ms": _ms(worst.begin_s - kill.at_s) if worst else None,
        "others_quiet_ms": _ms(longest_s(others, *before)),
        "others_stall_steps": round(worst_s / step - 1.0, 2),  # beyond the step that a gap always is
        "clocks_s": clocks(timelines, affected, kill.at_s, restored_s(kill, affected, play.offset_s), quiet),
        "lost_tokens": lost,
        "duplicated_tokens": duplicated,
        "errors": list(load.errors),
        "controller": told(kill, play.offset_s),
    }


async def working(play: Stage, rank: int) -> Device:
    """The device that has rank `rank` of the last replica. Raises `TimeoutError` if nothing is served in time."""
    async with asyncio.timeout(_BROKEN_S):
        while True:
            info = await play.service.info()
            if info is not None and info.positions:
                last = max(position.replica for position in info.positions)
                names = [position.device for position in info.positions if position.replica == last]
                instance, _, index = names[rank % len(names)].rpartition("/")
                return Device(instance, int(index))
            await asyncio.sleep(0.05)


def restored_s(kill: Kill, affected: Sequence[Timeline], offset_s: float) -> float:
    """When the affected requests had their state again: with the layout of the recovery if they needed one to go
    on, else just before the first of them did; the clients' clock.
    """
    resumed = min((_stall_end_s(one, kill) for one in affected), default=kill.until_s)
    layouts = [event.time_s - offset_s for event in kill.events if event.kind == "layout"]
    return max((at for at in layouts if at <= resumed), default=max(kill.at_s, resumed - _EARLIER_S))


def _stall_end_s(timeline: Timeline, kill: Kill) -> float:
    """The end of the longest gap: tokens that were on their way at the kill come before it."""
    gap = longest([timeline], kill.at_s, kill.until_s)
    return gap.end_s if gap else kill.until_s


def told(kill: Kill, offset_s: float) -> dict[str, Any]:
    """When the controller noticed, and the layouts that followed."""
    layouts = [controller_says(event) for event in kill.events if event.kind == "layout"]
    noticed_s = next(event.time_s - offset_s for event in kill.events if event.kind == "replica_failed")
    return {"noticed_ms": _ms(noticed_s - kill.at_s), "layouts": layouts}


def _ms(value_s: float) -> float:
    return round(1e3 * value_s, 2)
