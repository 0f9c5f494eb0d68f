"""`perennial demo`: the whole job, shown while it runs, judged and reported at the end."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data.errors import InvalidInput
from perennial.demo import prepare
from perennial.demo.display import outcome_table, plan_table, view
from perennial.demo.play import Play
from perennial.demo.prepare import Prepared
from perennial.demo.setting import Setting, setting
from perennial.fleet import Fleet, with_ports
from perennial.recording import PlanPoint, Recording, save
from perennial.report import render, summary
from perennial.report.summary import failures
from perennial.scenario import Scenario, scenario
from perennial.settings import Settings, load_settings
from profiling.campaign import Progress as Step
from profiling.fingerprint import this_machine

_START_S = 120.0


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The options of `perennial demo`."""

    seed: int
    short: bool
    device: str
    exact: bool
    plan: Path | None
    json: Path | None
    report: Path | None


def run(options: DemoOptions) -> int:
    """Run the demo; 0 if every stream was what it had to be, 1 if not."""
    if options.device not in ("cpu", "cuda"):
        raise InvalidInput(f"--device takes cpu or cuda, not {options.device!r}")
    console, settings = Console(), load_settings()
    chosen = setting(options.device, exact=options.exact, short=options.short)
    _check_devices(chosen)
    began = time.monotonic()
    prepared = _prepare(console, chosen, settings, options)
    console.print(plan_table(prepared.book))
    play = scenario(options.seed, chosen.shape)
    reference = _reference(console, chosen, prepared, play)
    recording = asyncio.run(_serve(console, chosen, settings, prepared, play, reference, options))
    recording.facts["whole demo"] = f"{time.monotonic() - began:.0f} s"
    return _conclude(console, recording, settings, options)


def _check_devices(chosen: Setting) -> None:
    if chosen.device != "cuda":
        return
    import torch

    found = torch.cuda.device_count()
    if found < chosen.instances:
        raise InvalidInput(f"this demo needs {chosen.instances} GPUs and found {found}; run it with --device cpu")


def _prepare(console: Console, chosen: Setting, settings: Settings, options: DemoOptions) -> Prepared:
    with _step(console, "checkpoint") as (_, done):
        path = prepare.checkpoint(chosen, settings)
        done(f"random {chosen.model['family']}, {chosen.model['layers']} layers, {chosen.dtype}")
    if options.plan is not None:
        return prepare.given(path, options.plan)
    with _step(console, "profile and plan") as (report, done):
        prepared = prepare.planned(chosen, settings, path, report)
        published = f"published as version {prepared.version}, champion" if prepared.version else "written to a file"
        done(f"{prepared.measured}; {published}")
    return prepared


def _reference(console: Console, chosen: Setting, prepared: Prepared, play: Scenario) -> dict[str, list[int]]:
    from perennial.reference import reference_streams

    requests = [arrival.request for arrival in play.arrivals]
    with _step(console, "undisturbed run") as (report, done):
        streams = reference_streams(
            str(prepared.checkpoint),
            requests,
            engine=chosen.engine,
            progress=lambda count: report(Step(what="streams", done=count, total=len(requests))),
        )
        done(f"{len(streams)} streams, {sum(map(len, streams.values()))} tokens on one device")
    return streams


async def _serve(
    console: Console,
    chosen: Setting,
    settings: Settings,
    prepared: Prepared,
    play: Scenario,
    reference: dict[str, list[int]],
    options: DemoOptions,
) -> Recording:
    fleet = _fleet(chosen, settings, prepared)
    try:
        with _step(console, "service") as (_, done):
            await fleet.start(chosen.instances, timeout_s=_START_S)
            done(f"{chosen.instances} instances of real processes, gRPC at {fleet.address}")
        playing = Play(fleet, play, reference)
        await _show(console, playing, fleet, play)
        info = await fleet.info()
        events = playing.events()
    finally:
        left = await fleet.close()
    return Recording(
        title=f"demo on {chosen.instances} local instances ({chosen.device})",
        seed=options.seed,
        duration_s=playing.duration_s,
        exact=chosen.exact,
        streams=playing.streams,
        actions=playing.actions,
        events=events,
        plan=_plan_points(prepared),
        plan_version=(info.plan_version if info else "") or prepared.version,
        plan_sha256=info.plan_sha256 if info else "",
        cost_model_error=prepared.error,
        facts=_facts(chosen, prepared),
        machine=this_machine(chosen.device, dtype=chosen.dtype, numerics=chosen.numerics).to_json(),
        leftovers=left,
    )


def _fleet(chosen: Setting, settings: Settings, prepared: Prepared) -> Fleet:
    home = settings.home / "demo"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    by_file = {"plan": str(prepared.plan_file.absolute())} if prepared.plan_file else {}
    by_registry = {"registry": settings.registry_uri, "registry_model": prepared.registry_model}
    configuration = settings.serving(
        engine=chosen.engine,
        checkpoint=str(prepared.checkpoint.absolute()),
        journal=str((home / "journal.sqlite").absolute()),
        ready_file=str((home / "ready.json").absolute()),
        **(by_file or by_registry),
    )
    return Fleet(with_ports(configuration), home=home, instance_type=chosen.type_name)


async def _show(console: Console, playing: Play, fleet: Fleet, play: Scenario) -> None:
    """Play, with a live picture of it."""
    task = asyncio.create_task(playing.run())
    total = sum(arrival.request.limits.max_tokens for arrival in play.arrivals)
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        while not task.done():
            live.update(view(playing, fleet, requests=len(play.arrivals), tokens=total))
            await asyncio.wait({task}, timeout=0.2)
    await task
    console.print(f"[green]✓[/green] workload: {playing.finished} streams, {len(playing.actions)} disturbances")


def _conclude(console: Console, recording: Recording, settings: Settings, options: DemoOptions) -> int:
    numbers = summary(recording)
    page = options.report or settings.home / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(recording), encoding="utf-8")
    save(recording, str(settings.home / "demo" / "recording.json"))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    console.print(outcome_table(numbers))
    found = failures(numbers)
    if found:
        console.print(f"[bold red]it did not hold: {'; '.join(found)}[/] (see {settings.home / 'demo' / 'logs'})")
    else:
        console.print("[bold green]Every stream is whole." + ("" if numbers["exact"] else " (bf16: agreement above)"))
    console.print(f"report: [bold]{page}[/bold]")
    return 1 if found else 0


def _plan_points(prepared: Prepared) -> list[PlanPoint]:
    return [
        PlanPoint(
            state=plan.state.key,
            instances=plan.state.instances,
            config=str(plan.config).split("·B")[0] if plan.config else "",
            latency_s=plan.estimate.latency_s if plan.estimate else None,
            throughput_rps=plan.estimate.throughput_rps if plan.estimate else None,
            reason=plan.reason,
        )
        for plan in prepared.book.plans
    ]


def _facts(chosen: Setting, prepared: Prepared) -> dict[str, str]:
    import torch

    spec, memory = prepared.book.model, chosen.cluster.types[0].memory_bytes
    facts = {
        "model": f"{spec.family}, {spec.layers} layers, hidden {spec.hidden}, {spec.weight_bytes / 1e6:.1f} MB, random",
        "numerics": f"{chosen.dtype}, {'independent of the layout' if chosen.exact else 'native kernels'}",
        "device memory in the plan": f"{memory / 1e6:.1f} MB",
        "fleet": f"{chosen.instances} instances of {chosen.type_name}, processes of this machine",
        "plan": f"policy {prepared.book.policy}, {prepared.book.sha256[:16]}",
        "measured": prepared.measured,
        "machine": f"{len(os.sched_getaffinity(0))} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}",
    }
    if chosen.device == "cuda":
        facts["GPU"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    return facts


@contextmanager
def _step(console: Console, name: str) -> Iterator[tuple[Callable[[Step], None], Callable[[str], None]]]:
    """A line that is live while the step runs and says what came of it afterwards."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    said: list[str] = []
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None)

        def report(step: Step) -> None:
            progress.update(task, description=f"{name}: {step.what}", completed=step.done, total=step.total or None)

        yield report, said.append
    console.print(f"[green]✓[/green] {name}: {'; '.join(said)} [dim]({time.monotonic() - began:.1f} s)")
