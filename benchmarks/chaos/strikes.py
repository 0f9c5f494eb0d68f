"""Carrying out disturbances on a real fleet."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos.script import Disturbance, Moment, Script
from perennial.fleet import Fleet
from perennial.processes import living
from serving.errors import NotFound, Retryable, TransportError

_MOMENT_S = 1.5  # how long to wait for an event that may never come
_EARLY = 0.4  # of the time that the notice promised
_LATE_S = 2.0
_ORDER: tuple[Moment, ...] = (
    "reconfiguration_started",
    "reconfiguration_copying",
    "reconfiguration_prepared",
    "reconfiguration_paused",
    "layout",
)


def reached(moment: Moment) -> frozenset[str]:
    """Kinds of events that show that a change has come to a moment, or past it."""
    return frozenset((*_ORDER[_ORDER.index(moment) :], "reconfiguration_failed"))


@dataclass(slots=True)
class Strikes:
    """Does to a fleet what a script says. `done` tells what was done to whom."""

    script: Script
    service: Fleet
    home: Path
    done: list[str]
    most: int
    books: Sequence[Path] = ()
    prefilling: asyncio.Event = field(default_factory=asyncio.Event)
    _background: list[asyncio.Task[None]] = field(default_factory=list)
    _mark: int = 0  # events before the last strike
    _book: int = 0

    async def all(self) -> None:
        """Every disturbance in order, and the end of what they set in motion."""
        for item in self.script.disturbances:
            await self._wait_for(item)
            self._mark = len(self.service.events)
            await self._do(item)
        await asyncio.gather(*self._background)
        missing = 2 - len(self._live())
        if missing > 0:  # so that everything can end
            self.service.launch(missing)
            self.done.append(f"add {missing} at the end")

    async def _wait_for(self, item: Disturbance) -> None:
        with contextlib.suppress(TimeoutError):
            if item.moment == "prefill":
                self.prefilling.clear()
                await asyncio.wait_for(self.prefilling.wait(), _MOMENT_S)
            elif item.moment != "delay":
                kinds = reached(item.moment)
                await self.service.wait_event(lambda event: event.kind in kinds, since=self._mark, timeout_s=_MOMENT_S)
        await asyncio.sleep(item.after_s)

    async def _do(self, item: Disturbance) -> None:
        if item.kind in ("add", "add_leaving", "controller", "controller_twice", "blackout", "plan"):
            victims: list[str] = []
        else:
            victims = self._victims(item)
            if not victims:
                return
        self.done.append(" ".join([item.kind, *victims]))
        match item.kind:
            case "kill" | "kill_two" | "kill_neighbours" | "kill_ends":
                await self._kill(victims)
            case "kill_holder":
                await self._kill(victims[:1])
                await asyncio.sleep(item.seconds)
                await self._kill(victims[1:])
            case "notice" | "notices" | "notice_early" | "notice_late" | "notice_withdrawn":
                await asyncio.gather(*(self._notice(name, item) for name in victims))
            case "kill_worker":
                self._signal_worker(victims[0], signal.SIGKILL)
            case "suspend":
                self.service.suspend(victims[0])
                self._later(item.seconds, self._resume(victims[0]))
            case "suspend_worker":
                stopped = self._signal_worker(victims[0], signal.SIGSTOP)
                self._later(item.seconds, _continue(stopped))
            case _:
                await self._to_the_fleet(item)

    async def _to_the_fleet(self, item: Disturbance) -> None:
        match item.kind:
            case "add":
                self.service.launch(max(0, min(item.count, self.most - len(self._live()))))
            case "add_leaving":
                (name,) = self.service.launch(1)
                self._later(item.seconds, self._notice(name, Disturbance("notice", seconds=0.5)))
            case "controller" | "controller_twice":
                for _ in range(2 if item.kind == "controller_twice" else 1):
                    await self.service.kill_controller()
                    await asyncio.sleep(item.seconds if item.kind == "controller" else 0.0)
                    await self.service.restart_controller()
                    await asyncio.sleep(item.seconds if item.kind == "controller_twice" else 0.0)
            case "plan":
                await self._change_plan()
            case "blackout":
                await self._kill(self.service.instances)
                await asyncio.sleep(item.seconds)
                self.service.launch(min(item.count, self.most))

    # -- victims --------------------------------------------------------------------------------

    def _live(self) -> list[str]:
        instances = self.service.instances.values()
        return sorted(item.name for item in instances if item.group.alive and not item.leaving and not item.suspended)

    def _victims(self, item: Disturbance) -> list[str]:
        """Whom it strikes, out of those who live; the first of a pair goes first."""
        live = self._live()
        if not live:
            return []
        first = item.victim % len(live)
        neighbour = (first + 1) % len(live)
        match item.kind:
            case "kill_ends":
                return ends_of_a_transfer(live, self._in_layout(), item.victim)
            case "kill_two":
                return _distinct(live[first], live[(first + 1 + item.victim // len(live)) % len(live)])
            case "kill_neighbours":
                return _distinct(live[first], live[neighbour])
            case "kill_holder":
                return _distinct(live[neighbour], live[first])
            case "notices":
                return _distinct(*(live[(first + step) % len(live)] for step in range(item.count)))
        return [live[first]]

    def _in_layout(self) -> set[str]:
        """Instances with a position in the last layout."""
        layouts = [event for event in self.service.events if event.kind == "layout"]
        positions: Any = layouts[-1].data["positions"] if layouts else ()
        return {str(position["device"]).rpartition("/")[0] for position in positions}

    # -- what is done to them -------------------------------------------------------------------

    async def _kill(self, names: Iterable[str]) -> None:
        await asyncio.gather(*(self.service.kill(name) for name in list(names)))

    async def _notice(self, name: str, item: Disturbance) -> None:
        if name not in self.service.instances:
            return
        with contextlib.suppress(NotFound):  # it has not joined, or not again
            await self.service.notice(name, item.seconds, then_kill=False)
        if item.kind != "notice_withdrawn":
            early, late_s = item.kind == "notice_early", _LATE_S if item.kind == "notice_late" else 0.0
            end = self._kill([name])
            self._later(item.seconds * _EARLY if early else item.seconds + late_s, end)

    def _signal_worker(self, name: str, number: signal.Signals) -> psutil.Process | None:
        group = self.service.instances[name].group
        for process in living([group.pid]):
            if process.pid != group.pid:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
                    return process
        return None

    async def _resume(self, name: str) -> None:
        if name in self.service.instances:
            self.service.resume(name)

    async def _change_plan(self) -> None:
        self._book = (self._book + 1) % len(self.books)
        async with self.service.client(give_up_s=1.0) as client:
            with contextlib.suppress(Retryable, TransportError):  # there may be no controller just now
                await client.reload_plan(str(self.books[self._book]))

    def _later(self, seconds: float, work: Coroutine[Any, Any, None]) -> None:
        async def after() -> None:
            await asyncio.sleep(seconds)
            await work

        self._background.append(asyncio.create_task(after()))


async def _continue(process: psutil.Process | None) -> None:
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def _distinct(*names: str) -> list[str]:
    return list(dict.fromkeys(names))


def ends_of_a_transfer(live: Sequence[str], in_layout: set[str], victim: int) -> list[str]:
    """An instance that holds state and one that is to get some: rather one that holds none yet."""
    sources = [name for name in live if name in in_layout] or list(live)
    source = sources[victim % len(sources)]
    others = [name for name in live if name != source]
    targets = [name for name in others if name not in in_layout] or others
    return [source, *targets[victim % len(targets) : victim % len(targets) + 1]] if targets else [source]
