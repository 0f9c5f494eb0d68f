"""A script played on a real fleet, after the fleet was measured."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.fidelity.calibration import rate_rps
from benchmarks.fidelity.clients import Clients, Stream
from benchmarks.fidelity.drag import Drag
from benchmarks.fidelity.measure import Measured, Survey, working
from benchmarks.fidelity.scripts import ENGINE, INSTANCES, MAX_BATCH, Script
from benchmarks.fidelity.watch import Watch
from data.layout import Device
from data.models import ModelSpec
from data.plan import PlanBook
from data.workload import Workload
from perennial.fleet import Fleet
from perennial.processes import Start
from perennial.testing import fleet, given_plans
from planning.simulation.story import Happening
from serving.engine.weights import read_spec
from serving.lifeline import settle
from serving.requests import Event

_FINISH_S = 180.0
_SETTLE_S = 60.0


@dataclass(frozen=True, slots=True)
class Played:
    """A run: its requests as they were sent, what came back, what happened to the fleet, and what it began with.

    `foreign_cores` are processors that other programs used, and `probe_ms` what a fixed piece of work took, while
    the fleet was measured, while it ran, and while it was measured again. `drag` is how slow the processors were from
    second to second of the run, beside all three.
    """

    workload: Workload
    streams: list[Stream]
    happenings: list[Happening]
    instances: list[str]
    layout: list[list[Device]]
    events: list[Event]
    began_unix_s: float
    foreign_cores: list[float] = field(default_factory=list)
    probe_ms: list[float] = field(default_factory=list)
    drag: list[tuple[float, float]] = field(default_factory=list)


async def play(script: Script, seed: int, checkpoint: str, home: Path, start: Start) -> tuple[Played, Measured]:
    """Start a fleet, measure it, play the script on it, and measure it again."""
    spec, found = read_spec(checkpoint), Measured()
    watch, begun_s = Watch(), time.monotonic()
    async with (
        fleet(
            checkpoint, instances=INSTANCES, plan=book_of(script, spec), home=home, engine=ENGINE, start=start
        ) as service,
        service.client(give_up_s=_FINISH_S) as client,
    ):
        watching = asyncio.create_task(watch.watch())
        clients = Clients(client, spec.vocab, seed)
        survey = Survey(service, clients, script, ENGINE, found)
        await survey.walk()
        workload = script.workload(seed, await asyncio.to_thread(rate_rps, found, script, spec))
        settle()  # the clients' own garbage collection is not the service's latency
        surveyed_s = time.monotonic()
        played = await _run(script, workload, service, clients)
        played_s = time.monotonic()
        await survey.walk()
        watching.cancel()
    moments = begun_s, surveyed_s, played_s, time.monotonic()
    played.foreign_cores.extend(watch.foreign_cores(*moments))
    played.probe_ms.extend(watch.probe_ms(*moments))
    drag = Drag.of(watch.probes)
    played.drag.extend(drag.course(surveyed_s, played_s))
    return played, found.felt(drag)


def book_of(script: Script, spec: ModelSpec) -> PlanBook:
    """The plan book that a script's fleet follows."""
    return given_plans(spec, script.layouts, max_batch=MAX_BATCH)


async def _run(script: Script, workload: Workload, service: Fleet, clients: Clients) -> Played:
    layout = await _layout(service)
    staying = [name for name, instance in service.instances.items() if not instance.leaving]
    instances, first = sorted(staying), len(service.events)
    began_s, began_unix_s = time.monotonic(), time.time()
    happenings: list[Happening] = []
    async with asyncio.timeout(workload.duration_s + _FINISH_S), asyncio.TaskGroup() as group:
        playing = group.create_task(clients.play(workload, began_s))
        group.create_task(_do(script, service, began_s, happenings))
    # requests of one moment may be sent in another order than they were drawn
    sent = sorted(zip(playing.result(), workload.requests, strict=True), key=lambda pair: pair[0].sent_s)
    requests = (replace(item, arrival_s=max(0.0, stream.sent_s - began_s)) for stream, item in sent)
    return Played(
        Workload(script.name, tuple(requests)),
        [stream for stream, _ in sent],
        happenings,
        instances,
        layout,
        list(service.events[first:]),
        began_unix_s,
    )


async def _do(script: Script, service: Fleet, began_s: float, happenings: list[Happening]) -> None:
    """The deeds, each at its time, or as soon as the fleet has digested the one before."""
    for deed in script.deeds:
        await asyncio.sleep(max(0.0, began_s + deed.time_s - time.monotonic()))
        name = "" if deed.kind == "add" else await working(service, deed.victim)
        at_s = time.monotonic() - began_s
        if deed.kind == "add":
            name = service.launch(1)[0]
        elif deed.kind == "notice":
            await service.notice(name, deed.grace_s)
        else:
            await service.kill(name)
        happenings.append(Happening(at_s, deed.kind, name, deed.grace_s))
    await service.wait_serving(timeout_s=_SETTLE_S)


async def _layout(service: Fleet) -> list[list[Device]]:
    """Devices of every replica in force, in the order of their ranks."""
    info = await service.wait_serving(timeout_s=_SETTLE_S)
    found: dict[int, list[tuple[int, int, Device]]] = {}
    for position in info.positions:
        instance, _, index = position.device.rpartition("/")
        place = position.stage, position.shard, Device(instance, int(index))
        found.setdefault(position.replica, []).append(place)
    return [[device for _, _, device in sorted(places)] for _, places in sorted(found.items())]
