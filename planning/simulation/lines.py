"""Replicas as lines of stages on shared processors: steps go from stage to stage, and who computes slows the others.

A stage works on one step at a time. The leader, which is the first stage, launches a step when it is free, as
long as no more steps are under way than there are stages, and takes finished steps in order. The processors
are shared by all stages that compute, so the speed of everybody follows their number (`processors.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

from data.layout import Device, ParallelConfig
from planning.load import IN_TOKENS
from planning.simulation.batching import Batcher, BatchLimits, Job, Part, mix
from planning.simulation.processors import Processors
from planning.step_laws import StepLaw

_ROUNDING_S = 1e-12  # what is left of a stage's work when it is done


@dataclass(slots=True, eq=False)
class Step:
    """A step under way: at `stage`, with `left_s` of its work there to do; beyond the last stage it is finished."""

    batcher: Batcher
    parts: list[Part]
    law: StepLaw
    left_s: float = field(init=False)
    work_s: float = field(init=False)
    stage: int = 0

    def __post_init__(self) -> None:
        self.work_s = self.left_s = self.law.work_s(mix(self.parts, self.batcher.limits.block_tokens))


@dataclass(slots=True, eq=False)
class Stages(ABC):
    """Stages through which steps go one after the other, whoever they are of."""

    number: int
    serving: bool = field(default=True, init=False)  # takes new requests and launches steps
    halted: bool = field(default=False, init=False)  # one of its workers is gone
    _steps: list[Step] = field(default_factory=list, init=False)
    _waits: bool = field(default=False, init=False)  # the leader found nothing to launch and waits for the oldest step

    @property
    @abstractmethod
    def stages(self) -> int:
        """How many there are."""

    @abstractmethod
    def schedule(self) -> Step | None:
        """The next step; None if nothing can be computed now."""

    @property
    def drained(self) -> bool:
        """Whether no step is under way."""
        return not self._steps

    @property
    def working(self) -> list[Step]:
        """The steps that are computed now: the oldest at every stage."""
        first: dict[int, Step] = {}
        for step in self._steps:
            if step.stage < self.stages:
                first.setdefault(step.stage, step)
        return [] if self.halted else list(first.values())

    def lead(self) -> list[Job]:
        """What the leader does now: take finished steps, launch new ones. Returns the jobs that drew a token."""
        drew: list[Job] = []
        self._pass_on()
        while not self.halted and not any(step.stage == 0 for step in self._steps):
            if self._launch():
                break
            if not self._steps or self._steps[0].stage < self.stages:
                break
            finished = self._steps.pop(0)
            drew += finished.batcher.complete(finished.parts)
            self._waits = False
        return drew

    def _launch(self) -> bool:
        if not self.serving or self._waits or len(self._steps) >= self.stages:
            return False
        step = self.schedule()
        if step is None:
            self._waits = bool(self._steps)
            return False
        self._steps.append(step)
        return True

    def _pass_on(self) -> None:
        for step in self.working:
            if step.left_s <= _ROUNDING_S:
                step.stage += 1
                step.left_s = step.work_s


@dataclass(slots=True, eq=False)
class Line(Stages):
    """One replica; `number` is never used again, `config` describes one replica."""

    config: ParallelConfig
    devices: tuple[Device, ...]
    law: StepLaw
    limits: BatchLimits
    batcher: Batcher = field(init=False)

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.limits)

    @property
    def stages(self) -> int:
        """Of its configuration."""
        return self.config.stages

    def schedule(self) -> Step | None:
        """Of the only batcher."""
        parts = self.batcher.schedule()
        return Step(self.batcher, parts, self.law) if parts else None

    @property
    def room(self) -> int:
        """How many more requests it takes: a small backlog keeps its batch full."""
        most = self.config.max_batch + max(1, self.config.max_batch // 4)
        return most - len(self.batcher.jobs) if self.serving else 0

    @property
    def outstanding(self) -> float:
        """Tokens left to compute, as dispatch counts them where nobody knows how quick replicas are."""
        return sum(IN_TOKENS.device_s(job.work) for job in self.batcher.jobs)

    @property
    def known_tokens(self) -> int:
        """Known tokens of everything that is here."""
        return sum(job.known for job in self.batcher.jobs)

    def break_up(self) -> list[Job]:
        """The replica is gone: its jobs, without the steps under way. Their caches are as the last steps left them."""
        jobs = self.batcher.jobs
        for job in jobs:
            job.in_flight = False
        self._steps.clear()
        return jobs


def next_change_s(lines: Iterable[Stages], slowdown: float, processors: Processors) -> float:
    """Seconds until a stage is done with its work, or others compute, if nothing else happens."""
    working = _working(lines)
    ends = (step.left_s * slow * slowdown for step, slow in _paces(working, processors) if slow < inf)
    return min(processors.until_dealt_s(len(working)), min(ends, default=inf))


def work(lines: Iterable[Stages], seconds: float, slowdown: float, processors: Processors) -> None:
    """Let every stage compute for `seconds`, in which nothing changes before the end."""
    working = _working(lines)
    for step, slow in _paces(working, processors):
        step.left_s -= seconds / (slow * slowdown)
    processors.spend(seconds)


def _working(lines: Iterable[Stages]) -> list[tuple[Stages, Step]]:
    return [(line, step) for line in lines for step in line.working]


def _paces(working: Sequence[tuple[Stages, Step]], processors: Processors) -> list[tuple[Step, float]]:
    """Steps, and how slow they are."""
    busy = len(working)
    return [(step, processors.slow(line.number, line.stages, step.law, busy)) for line, step in working]
