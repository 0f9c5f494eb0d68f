"""What a simulated fleet consists of beside its replicas: a clock with an agenda, the queue, the processors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Generic, TypeVar

from planning.simulation.batching import Job
from planning.simulation.lines import Line, Stages, next_change_s, work
from planning.simulation.processors import Processors

_Lines = TypeVar("_Lines", bound=Stages)


@dataclass(slots=True)
class Agenda:
    """What is to be done when; of one moment, in the order in which it was said."""

    now_s: float = 0.0
    _items: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: count[int] = field(default_factory=count)

    @property
    def next_s(self) -> float:
        """When something is to be done next."""
        return self._items[0][0] if self._items else inf

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do `action` in so many seconds."""
        heappush(self._items, (self.now_s + seconds, next(self._numbers), action))

    def act(self) -> None:
        """Do what is due."""
        while self.next_s <= self.now_s:
            heappop(self._items)[2]()


@dataclass(slots=True)
class Queue:
    """Requests without a replica, and which replica gets them: of those with room the one with the least work left."""

    jobs: deque[Job] = field(default_factory=deque)

    def give_back(self, jobs: Iterable[Job]) -> None:
        """Requests that lost their replica and their KV, before all others and in their order of arrival."""
        for job in sorted(jobs, key=lambda one: one.key, reverse=True):
            job.lose()
            self.jobs.appendleft(job)

    def hand_out(self, lines: Sequence[Line]) -> None:
        """Fill what room there is."""
        while self.jobs:
            having_room = [line for line in lines if line.room > 0]
            if not having_room:
                return
            chosen = min(having_room, key=lambda line: (line.outstanding, -line.room, line.number))
            chosen.batcher.add(self.jobs.popleft())


@dataclass(slots=True)
class Machine(Generic[_Lines]):
    """Replicas that compute, on which processors, and what slows them down."""

    lines: dict[int, _Lines] = field(default_factory=dict)
    slowdowns: list[float] = field(default_factory=list)
    drag: float = 1.0
    processors: Processors = field(default_factory=Processors)

    @property
    def slowdown(self) -> float:
        """By how much steps take longer: the worst of what goes on beside them counts, and how quick processors are."""
        return max(self.slowdowns, default=1.0) * self.drag

    def follow(self, course: Sequence[tuple[float, float]], agenda: Agenda) -> None:
        """The drag of the processors from each time on, which somebody measured."""
        for time_s, factor in course:
            agenda.after(time_s, partial(setattr, self, "drag", factor))

    def next_s(self) -> float:
        """Seconds until a stage is done, or others compute."""
        return next_change_s(self.lines.values(), self.slowdown, self.processors)

    def work(self, seconds: float) -> None:
        """Compute for `seconds`, in which nothing changes before the end."""
        work(self.lines.values(), seconds, self.slowdown, self.processors)

    def lead(self) -> list[Job]:
        """Let every leader act; returns the jobs that drew a token."""
        return [job for line in list(self.lines.values()) for job in line.lead()]


def run(
    agenda: Agenda,
    machine: Machine[_Lines],
    decide: Callable[[], None],
    told: Callable[[Job], None],
    until_s: float = inf,
) -> None:
    """Let time pass until nothing can happen any more; `decide` what follows from each moment, be `told` of tokens."""
    while agenda.now_s < until_s:
        drew = machine.lead()
        decide()
        for job in [*drew, *machine.lead()]:
            told(job)
        step_s = min(machine.next_s(), agenda.next_s - agenda.now_s)
        if step_s == inf:
            break
        machine.work(step_s)
        agenda.now_s += step_s
        agenda.act()
