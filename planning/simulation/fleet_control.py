"""The controller of a simulated fleet: membership, one change of the layout at a time, recovery.

Targets come from the plan book and transitions from `planning.transition`, as in the real controller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from data.layout import Device, ParallelConfig
from planning.simulation.batching import Job
from planning.simulation.fleet_profile import FleetProfile
from planning.simulation.lines import Line
from planning.simulation.machine import Agenda, Machine, Queue
from planning.simulation.members import Members
from planning.simulation.seating import join, seat
from planning.simulation.story import Happening, LayoutChange
from planning.transition import Transition, position_boxes


@dataclass(slots=True, eq=False)
class _Change:
    target: ParallelConfig
    transition: Transition
    retired: list[Line]
    kept: list[Line]
    stranded: list[Job]
    recovery: bool
    started_s: float
    paused_s: float | None = None
    switching: bool = False

    @property
    def devices(self) -> int:
        """Devices of new replicas."""
        return sum(len(new.devices) for new in self.transition.new)

    def needs(self, instance: str) -> bool:
        """Whether the end of an instance ends the attempt."""
        lines = [*self.retired, *([] if self.transition.new else self.kept)]
        return self.builds_on(instance) or any(one.instance == instance for line in lines for one in line.devices)

    def builds_on(self, instance: str) -> bool:
        """Whether a new replica is to be on an instance."""
        return any(device.instance == instance for new in self.transition.new for device in new.devices)


@dataclass(slots=True, eq=False)
class Controller:
    """Turns the replicas on `machine` into what the book says; `changes` are those that were carried out."""

    members: Members
    profile: FleetProfile
    agenda: Agenda
    machine: Machine[Line]
    queue: Queue
    changes: list[LayoutChange] = field(default_factory=list)
    _config: ParallelConfig | None = None
    _stranded: list[Job] = field(default_factory=list)
    _broken: bool = False
    _change: _Change | None = None
    _looking: bool = False
    _again: bool = False
    _numbers: count[int] = field(default_factory=lambda: count(1))

    def begin_with(self, layout: Sequence[Sequence[Device]]) -> None:
        """Serve from now on, on replicas of these devices, or as the book says."""
        target = self.members.target()
        transition = self.members.plan(target, self.machine.lines) if target else None
        if target is None or transition is None:
            return
        for devices in layout or [new.devices for new in transition.new]:
            self._start(replace(target, replicas=1), tuple(devices))
            boxes = (position_boxes(self.members.book.model, target, rank) for rank in range(len(devices)))
            self.members.hold(dict(zip(devices, boxes, strict=True)))
        self._config = target
        self.members.clear_up(self._config, self.machine.lines)

    # -- what happens -----------------------------------------------------------------------------------

    def happen(self, one: Happening) -> None:
        """An instance is told to leave, is killed, or is started."""
        if one.kind == "add":
            self._launch(one.instance)
        elif one.kind == "kill":
            self._kill(one.instance)
        elif one.instance in self.members.instances:
            self.members.leaving.add(one.instance)
            self.agenda.after(one.grace_s, lambda: self._kill(one.instance))
            if self._change is not None and self._change.paused_s is None and self._change.builds_on(one.instance):
                self._fail()
            self._look()

    def _launch(self, instance: str) -> None:
        charges = self.profile.charges
        self.machine.slowdowns.append(charges.start_slowdown)

        def joined() -> None:
            self.machine.slowdowns.remove(charges.start_slowdown)
            self.members.instances.append(instance)
            self._look()

        self.agenda.after(charges.start_s, joined)

    def _kill(self, instance: str) -> None:
        """Nothing, if it was dismissed already."""
        if instance in self.members.instances:
            for line in self._lines_on(instance):
                line.halted = True
            self.agenda.after(self.profile.charges.detect_s, lambda: self._lost(instance))

    def _lost(self, instance: str) -> None:
        if instance not in self.members.instances:
            return
        self.members.forget(instance)
        for line in self._lines_on(instance):
            self._strand(line)
            self._broken = True
        if self._change is not None and self._change.needs(instance):
            self._fail()
        self._look()

    def _lines_on(self, instance: str) -> list[Line]:
        lines = self.machine.lines.values()
        return [line for line in lines if any(device.instance == instance for device in line.devices)]

    def _strand(self, line: Line) -> None:
        del self.machine.lines[line.number]
        self._stranded += line.break_up()

    # -- changes ----------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Look at the fleet soon; while a change is under way, after it."""
        if self._change is not None:
            self._again = True
        elif not self._looking:
            self._looking = True
            self.agenda.after(self.profile.charges.settle_s, self._decide)

    def _decide(self) -> None:
        self._looking = False
        target = self.members.target()
        transition = self.members.plan(target, self.machine.lines) if target else None
        if target is None or transition is None:
            self._replay(self._stranded)
        elif not transition.empty or self._stranded:
            self._begin(target, transition)
            return
        else:
            self._config = target
        self.members.clear_up(self._config, self.machine.lines)

    def _begin(self, target: ParallelConfig, transition: Transition) -> None:
        self._replay([job for job in self._stranded if not job.cached])
        charges, lines = self.profile.charges, self.machine.lines
        retired, kept = ([lines[one] for one in numbers] for numbers in (transition.retire, transition.keep))
        idle = not transition.new and not self._stranded and not any(line.batcher.jobs for line in retired)
        now_s, stranded = self.agenda.now_s, list(self._stranded)
        change = self._change = _Change(target, transition, retired, kept, stranded, self._broken, now_s)
        self.machine.slowdowns.append(charges.slowdown)
        self.agenda.after(0.0 if idle else charges.prepare.of(change.devices), lambda: self._pause(change))

    def _pause(self, change: _Change) -> None:
        if change is self._change:
            change.paused_s = self.agenda.now_s
            for line in change.retired:
                line.serving = False

    def watch(self) -> None:
        """Switch as soon as the replicas that were paused have finished their steps."""
        change = self._change
        if change is None or change.paused_s is None or change.switching:
            return
        if all(line.drained for line in change.retired):
            change.switching = True
            self.agenda.after(self.profile.charges.transfer.of(change.devices), lambda: self._switch(change))

    def _switch(self, change: _Change) -> None:
        if change is not self._change or change.paused_s is None:
            return
        moved, replayed = self._rehome(change)
        self.members.hold(change.transition.needed)
        self._config, self._broken = change.target, False
        times = change.started_s, change.paused_s, self.agenda.now_s
        self.changes.append(LayoutChange(*times, change.target, change.recovery, moved, replayed))
        self._end(change)
        self.members.clear_up(self._config, self.machine.lines)

    def _rehome(self, change: _Change) -> tuple[int, int]:
        """Old replicas make place for new ones; how many requests went on there, and how many are computed again."""
        origin = {job: line.number for line in change.retired for job in line.batcher.jobs}
        new = [self._start(one.config, one.devices) for one in change.transition.new]
        for line in change.retired:
            del self.machine.lines[line.number]
            line.break_up()
        known = [*origin, *change.stranded]
        moving = [job for job in known if job.cached]
        inherits = [one.inherits for one in change.transition.new]
        left = seat(moving, new, inherits, origin) if new else join(moving, change.kept)
        replayed = [*left, *(job for job in known if not job.cached)]
        self._stranded = [job for job in self._stranded if job not in change.stranded]
        self.queue.give_back(replayed)
        return len(known) - len(replayed), len(replayed)

    def _end(self, change: _Change) -> None:
        self.machine.slowdowns.remove(self.profile.charges.slowdown)
        self._change = None
        if self._again:
            self._again = False
            self._look()

    def _fail(self) -> None:
        """The attempt is void; replicas that were paused for it are broken, with all that they have cached."""
        change = self._change
        assert change is not None
        if change.paused_s is not None:
            for line in change.retired:
                if line.number in self.machine.lines:
                    self._strand(line)
        self.machine.slowdowns.remove(self.profile.charges.slowdown)
        self._change, self._again, self._looking = None, False, True
        self.agenda.after(self.profile.charges.retry_s + self.profile.charges.settle_s, self._decide)

    def _replay(self, jobs: Iterable[Job]) -> None:
        """Back into the queue, to be computed again."""
        again = list(jobs)
        self._stranded = [job for job in self._stranded if job not in again]
        self.queue.give_back(again)

    def _start(self, config: ParallelConfig, devices: tuple[Device, ...]) -> Line:
        line = Line(next(self._numbers), config, devices, self.profile.law(config), self.profile.limits(config))
        self.machine.lines[line.number] = line
        return line
