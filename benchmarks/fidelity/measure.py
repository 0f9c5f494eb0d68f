"""The profile of a fleet as it runs: steps in every layout of a script, and what changes take.

The fleet walks down its ladder of layouts and up again before the run that is to be predicted, and after it, for
processors are not always equally quick. At every layout requests are sent at once, in different numbers,
and between them instances are told to leave, are killed and are added while requests run. Nothing of the run
itself is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from benchmarks.fidelity.clients import Clients, Stream, tokens_per_s
from benchmarks.fidelity.drag import Drag
from benchmarks.fidelity.scripts import INSTANCES, MAX_BATCH, Script
from benchmarks.fidelity.steps import StepSurvey, twice
from perennial.fleet import Fleet
from planning.simulation.fleet_profile import Charges, Degrees, fit_duration
from planning.step_laws import Observed, StepLaw, fit_law
from serving.requests import Event
from serving.settings import EngineSettings

_PROMPT, _OUTPUT = 16, 32  # of the requests that run while the fleet changes
_BEFORE_S = 1.5
_EVENT_S, _SETTLE_S = 30.0, 60.0
_GRACE_S = 3.0


@dataclass(slots=True)
class Measured:
    """Observations of steps by degrees, and of changes by kind."""

    steps: list[tuple[Degrees, Observed]] = field(default_factory=list)
    changes: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # devices of new replicas, value

    def note(self, what: str, value: float, devices: int = 0) -> None:
        """Something that a change took."""
        self.changes.setdefault(what, []).append((devices, value))

    def add_changes(self, other: Measured) -> None:
        """Take in what another fleet's changes took: too few happen to one fleet."""
        for what, values in other.changes.items():
            self.changes.setdefault(what, []).extend(values)

    def felt(self, drag: Drag) -> Measured:
        """The same, with how slow the processors were at each observation of steps."""
        return Measured([(degrees, drag.felt(one)) for degrees, one in self.steps], self.changes)

    def eased(self, feel: float) -> Measured:
        """The same, with the part of the drag that steps feel."""
        return Measured([(degrees, replace(one, drag=one.drag**feel)) for degrees, one in self.steps], self.changes)

    def twice(self) -> list[tuple[Observed, Observed]]:
        """The same steps, before the run and after it."""
        return [pair for observed in self.by_degrees().values() for pair in twice(observed)]

    def laws(self) -> dict[Degrees, StepLaw]:
        """The laws that explain the steps."""
        return {degrees: fit_law(observed, degrees[0]) for degrees, observed in self.by_degrees().items()}

    def by_degrees(self) -> dict[Degrees, list[Observed]]:
        """The observations of steps, in the order in which they were made."""
        found: dict[Degrees, list[Observed]] = defaultdict(list)
        for degrees, observed in self.steps:
            found[degrees].append(observed)
        return found

    def charges(self) -> Charges:
        """Medians, and by the number of devices where it matters."""
        middle = {what: median(value for _, value in values) for what, values in self.changes.items()}
        return Charges(
            prepare=fit_duration(self.changes["prepare_s"]),
            transfer=fit_duration(self.changes["transfer_s"]),
            slowdown=max(1.0, middle["slowdown"]),
            start_s=middle["start_s"],
            start_slowdown=max(1.0, middle["start_slowdown"]),
            detect_s=middle["detect_s"],
            settle_s=middle["settle_s"],
        )


def degrees_of(layout: str) -> tuple[int, Degrees]:
    """Replicas, and (stages, shards), of `RxPxT`."""
    replicas, stages, shards = (int(degree) for degree in layout.split("x"))
    return replicas, (stages, shards)


class Survey:
    """Measures one fleet into `found`."""

    def __init__(self, fleet: Fleet, clients: Clients, script: Script, engine: EngineSettings, found: Measured) -> None:
        self._fleet, self._clients, self._script, self._found = fleet, clients, script, found
        self._survey = StepSurvey(clients, engine.step_tokens, engine.block_tokens, script.prompts, script.outputs)
        self._offset_s = time.time() - time.monotonic()

    async def walk(self) -> None:
        """All layouts with a notice and a kill between them, and back to the first by additions.

        Instances that are missing at the beginning are started.
        """
        await self._fleet.reap()
        missing = INSTANCES - sum(not one.leaving for one in self._fleet.instances.values())
        if missing:
            await self._fleet.add(missing)
            await self._fleet.wait_serving(timeout_s=_SETTLE_S)
        for instances in range(INSTANCES, 1, -1):
            await self._steps(self._script.layouts[instances])
            if instances > 2:
                await self._lose(notice=instances % 2 == 0)
        for _ in range(INSTANCES - 2):
            await self._add()

    async def _steps(self, layout: str) -> None:
        replicas, degrees = degrees_of(layout)
        observed = await self._survey.measure(replicas, degrees[0], MAX_BATCH)
        self._found.steps += [(degrees, one) for one in observed]

    # -- changes ----------------------------------------------------------------------------------------

    async def _lose(self, *, notice: bool) -> None:
        async with self._load() as streams:
            first, victim = len(self._fleet.events), await working(self._fleet, 0)
            at_s = time.monotonic()
            if notice:
                await self._fleet.notice(victim, _GRACE_S)
            else:
                await self._fleet.kill(victim)
            cause = "notice" if notice else "replica_failed"
            event = await self._fleet.wait_event(lambda one: one.kind == cause, since=first, timeout_s=_EVENT_S)
            if not notice:
                self._found.note("detect_s", self._clock(event) - at_s)
            await self._change(first, event, streams)

    async def _add(self) -> None:
        async with self._load() as streams:
            first, at_s = len(self._fleet.events), time.monotonic()
            await self._fleet.add()
            joined = next(one for one in self._fleet.events[first:] if one.kind == "instance_joined")
            self._found.note("start_s", self._clock(joined) - at_s)
            self._found.note("start_slowdown", _slowdown(streams, at_s, self._clock(joined)))
            await self._change(first, joined, streams)

    async def _change(self, first: int, cause: Event, streams: list[Stream]) -> None:
        """What the change that follows `cause` takes; nothing if none does."""
        await self._fleet.wait_serving(timeout_s=_SETTLE_S)
        moments = {one.kind: one for one in self._fleet.events[first:]}
        if "layout" not in moments or "reconfiguration_failed" in moments:
            return
        started, paused = (self._clock(moments[f"reconfiguration_{kind}"]) for kind in ("started", "paused"))
        layout, found = moments["layout"].data, self._found
        devices = _built(self._fleet.events[:first], moments["layout"])
        found.note("settle_s", started - self._clock(cause))
        found.note("prepare_s", paused - started, devices)
        found.note("transfer_s", float(layout["seconds"]["transfer"]), devices)
        if devices:
            found.note("slowdown", _slowdown(_undisturbed(streams, started), started, paused), devices)

    @contextlib.asynccontextmanager
    async def _load(self) -> AsyncIterator[list[Stream]]:
        """Requests all the time, as many as there were instances at first."""
        streams: list[Stream] = []

        async def again() -> None:
            while True:
                await self._clients.send(_PROMPT, _OUTPUT, streams)

        tasks = [asyncio.create_task(again()) for _ in range(INSTANCES)]
        try:
            await asyncio.sleep(2 * _BEFORE_S)
            yield streams
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._fleet.wait_serving(timeout_s=_SETTLE_S)
        await self._fleet.reap()

    def _clock(self, event: Event) -> float:
        return event.time_s - self._offset_s


def _built(before: Sequence[Event], layout: Event) -> int:
    """Devices of the replicas that a layout has and the one before it had not."""
    last = next((one for one in reversed(before) if one.kind == "layout"), None)
    kept = _replicas(last) if last else set()
    return sum(len(devices) for devices in _replicas(layout) - kept)


def _replicas(layout: Event) -> set[tuple[str, ...]]:
    """Devices of every replica, in the order of their ranks."""
    positions = layout.data["positions"]
    numbers = {one["replica"] for one in positions}
    return {tuple(one["device"] for one in positions if one["replica"] == number) for number in numbers}


def _undisturbed(streams: list[Stream], since_s: float) -> list[Stream]:
    """Streams that brought a token soon after: the others' replica had broken."""
    return [one for one in streams if any(since_s < time_s < since_s + 0.2 for time_s in one.times_s)]


def _slowdown(streams: list[Stream], begin_s: float, end_s: float) -> float:
    """How many times as many tokens came per second before an interval as in it; 1 if nothing says so."""
    inside = tokens_per_s(streams, begin_s, end_s) if end_s > begin_s else 0.0
    before = tokens_per_s(streams, begin_s - _BEFORE_S, begin_s)
    return before / inside if inside and before else 1.0


async def working(fleet: Fleet, number: int) -> str:
    """The name of the `number`-th instance that has a position and is not leaving, in turn."""
    info = await fleet.wait_serving(timeout_s=_SETTLE_S)
    busy = {position.device.rpartition("/")[0] for position in info.positions}
    names = sorted(name for name in busy if name in fleet.instances and not fleet.instances[name].leaving)
    return names[number % len(names)]
