"""Planned changes, one after the other on one running service."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.reconfiguration.change import Moments, Quiet, seen
from benchmarks.reconfiguration.minimum import World, against
from benchmarks.reconfiguration.options import has_residency
from benchmarks.reconfiguration.stage import Bench, Stage, config, last_words, stage
from benchmarks.reconfiguration.timeline import continuity
from data.errors import PerennialError
from data.layout import Device
from serving.requests import Event

Report = Callable[[dict[str, Any]], None]
_LOAD_S = 240.0
_LOG_LINES = 20


@dataclass(frozen=True, slots=True)
class Step:
    """A change that is measured; `asked` ones have bars, the others lead from one to the next."""

    name: str
    before: str
    after: str
    gpus: int
    asked: bool = True


CHAIN = (
    Step("TP4→TP2", "1x1x4", "1x1x2", 4),
    Step("TP2→TP1", "1x1x2", "1x1x1", 2),
    Step("TP1→TP2", "1x1x1", "1x1x2", 2),
    Step("TP2→PP2", "1x1x2", "1x2x1", 2, asked=False),
    Step("PP2→TP2", "1x2x1", "1x1x2", 2),
    Step("(1,1,2)→(2,1,1)", "1x1x2", "2x1x1", 2),
    Step("(2,1,1)→(1,1,2)", "2x1x1", "1x1x2", 2, asked=False),
    Step("TP2→TP4", "1x1x2", "1x1x4", 4),
)


def possible(gpus: int) -> tuple[list[Step], list[Step]]:
    """The steps that so many GPUs can take, and those that they cannot."""
    return [step for step in CHAIN if step.gpus <= gpus], [step for step in CHAIN if step.gpus > gpus]


async def measure(bench: Bench, link_bytes_per_s: float | None, report: Report) -> None:
    """Both chains, without and with the whole model on every device; reports every change and what is left out."""
    gpus = bench.options.gpus
    steps, missing = possible(gpus)
    for step in missing:
        report(
            {"case": "planned", "name": step.name, "skipped": f"{step.name} needs {step.gpus} GPUs, here are {gpus}"}
        )
    if not steps:
        return
    for residency in ("shard", "model"):
        if residency == "model" and not has_residency():
            report({"case": "planned", "name": "residency", "skipped": "the engine has no setting for residency"})
            continue
        try:
            await _chain(bench, steps, residency, link_bytes_per_s, report)
        except (PerennialError, TimeoutError) as error:  # the other chain has a service of its own
            failed = f"{type(error).__name__}: {error}"
            logs = last_words(bench.options.out / "logs" / f"planned-{residency}", _LOG_LINES)
            report({"case": "planned", "name": f"residency {residency}", "failed": failed, "logs": logs})


async def _chain(
    bench: Bench, steps: Sequence[Step], residency: str, link_bytes_per_s: float | None, report: Report
) -> None:
    instances, requests = 4 if bench.options.gpus >= 4 else 2, bench.options.requests
    engine = {"residency": residency} if has_residency() else {}
    opening = {instances: steps[0].before}
    name = f"planned-{residency}"
    async with stage(
        bench, name, instances=instances, layouts=opening, requests=requests, batch=requests, engine=engine
    ) as play:
        world = World(bench.spec, bench.spec.dtype_bytes, whole_model_resident=residency == "model")
        usable = await play.devices()
        _open(world, play, steps[0].before, usable)
        for number, step in enumerate(steps):
            if number:  # contexts of the length that is asked for, and nothing left to do for what was before
                await play.load.renew(timeout_s=_LOAD_S)
                world.forget_tokens()
            record = await _measure(play, world, usable, instances, step, link_bytes_per_s)
            report({"case": "planned", "name": step.name, "asked": step.asked, "residency": residency, **record})


def _open(world: World, play: Stage, layout: str, usable: Sequence[Device]) -> None:
    first = next(event for event in play.service.events if event.kind == "layout")
    world.advance(config(layout, play.batch), usable, 0, first.data)


async def _measure(
    play: Stage, world: World, usable: Sequence[Device], instances: int, step: Step, link_bytes_per_s: float | None
) -> dict[str, Any]:
    options, load = play.bench.options, play.load
    before = await play.watch(options.before_s)
    events = await play.change(instances, step.after)
    after = await play.watch(options.after_s)
    moments = Moments.of(events, play.offset_s)
    settled = (max(after[0], after[1] - options.before_s), after[1])
    layout = events[-1]
    cached = load.cached_tokens(moments.in_force_s)
    least = world.advance(config(step.after, play.batch), usable, cached, layout.data)
    timelines = load.recent(before[0])
    lost, duplicated = continuity(timelines)
    play.bench.say(f"{step.name}: in force {time.monotonic() - before[1]:.1f} s after the order, window included")
    return {
        **seen(timelines, moments, Quiet(before, settled)),
        "bytes": with_link(against(layout.data["moved"], layout.data["seconds"], least), link_bytes_per_s),
        "lost_tokens": lost,
        "duplicated_tokens": duplicated,
        "errors": list(load.errors),
        "attempts": sum(event.kind == "reconfiguration_started" for event in events),
        "controller": controller_says(layout),
    }


def with_link(moved: dict[str, Any], link_bytes_per_s: float | None) -> dict[str, Any]:
    """The rates as parts of what the link can do, where it was measured."""
    if not link_bytes_per_s:
        return moved
    rates = {name: moved[f"{name}_rate"] for name in ("weights", "kv")}
    return moved | {
        f"{name}_link_share": round(rate / link_bytes_per_s, 4) for name, rate in rates.items() if rate is not None
    }


def controller_says(layout: Event) -> dict[str, Any]:
    """What the event says apart from positions, with its times in milliseconds."""
    kept = {name: value for name, value in layout.data.items() if name not in ("positions", "seconds")}
    return kept | {"ms": {name: round(1e3 * value, 2) for name, value in layout.data["seconds"].items()}}
