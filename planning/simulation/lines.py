"""Replicas as lines of stages on shared processors: steps go from stage to stage, and who computes slows the others.

A stage works on one step at a time. The leader, which is the first stage, launches a step when it is free, as
long as no more steps are under way than there are stages, and takes finished steps in order. The processors
are shared by all stages that compute, so the speed of everybody follows their number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from data.layout import Device, ParallelConfig
from planning.load import IN_TOKENS
from planning.simulation.batching import Batcher, BatchLimits, Job, Part, mix
from planning.step_laws import StepLaw

_ROUNDING_S = 1e-12  # what is left of a stage's work when it is done


@dataclass(slots=True, eq=False)
class _Step:
    """A step under way: at `stage`, with `left_s` of its work there to do; beyond the last stage it is finished."""

    parts: list[Part]
    work_s: float
    left_s: float
    stage: int = 0


@dataclass(slots=True, eq=False)
class Line:
    """One replica; `number` is never used again, `config` describes one replica."""

    number: int
    config: ParallelConfig
    devices: tuple[Device, ...]
    law: StepLaw
    limits: BatchLimits
    serving: bool = True  # takes new requests and launches steps
    halted: bool = False  # one of its workers is gone
    batcher: Batcher = field(init=False)
    _steps: list[_Step] = field(default_factory=list)
    _waits: bool = False  # the leader found nothing to launch and waits for the oldest step

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.limits)

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
    def drained(self) -> bool:
        """Whether no step is under way."""
        return not self._steps

    @property
    def known_tokens(self) -> int:
        """Known tokens of everything that is here."""
        return sum(job.known for job in self.batcher.jobs)

    @property
    def working(self) -> list[_Step]:
        """The steps that are computed now: the oldest at every stage."""
        first: dict[int, _Step] = {}
        for step in self._steps:
            if step.stage < self.config.stages:
                first.setdefault(step.stage, step)
        return [] if self.halted else list(first.values())

    def break_up(self) -> list[Job]:
        """The replica is gone: its jobs, without the steps under way. Their caches are as the last steps left them."""
        jobs = self.batcher.jobs
        for job in jobs:
            job.in_flight = False
        self._steps.clear()
        return jobs

    def lead(self) -> list[Job]:
        """What the leader does now: take finished steps, launch new ones. Returns the jobs that drew a token."""
        drew: list[Job] = []
        self._pass_on()
        while not self.halted and not any(step.stage == 0 for step in self._steps):
            if self._launch():
                break
            if not self._steps or self._steps[0].stage < self.config.stages:
                break
            drew += self.batcher.complete(self._steps.pop(0).parts)
            self._waits = False
        return drew

    def _launch(self) -> bool:
        if not self.serving or self._waits or len(self._steps) >= self.config.stages:
            return False
        parts = self.batcher.schedule()
        if not parts:
            self._waits = bool(self._steps)
            return False
        work_s = self.law.work_s(mix(parts))
        self._steps.append(_Step(parts, work_s, work_s))
        return True

    def _pass_on(self) -> None:
        for step in self.working:
            if step.left_s <= _ROUNDING_S:
                step.stage += 1
                step.left_s = step.work_s


def next_end_s(lines: Iterable[Line], slowdown: float) -> float:
    """Seconds until a stage is done with its work, if nothing else happens."""
    working = [(line, line.working) for line in lines]
    busy = sum(len(steps) for _, steps in working)
    return min((step.left_s * line.law.slow(busy) * slowdown for line, steps in working for step in steps), default=inf)


def work(lines: Iterable[Line], seconds: float, slowdown: float) -> None:
    """Let every stage compute for `seconds`, in which none becomes done before the end."""
    working = [(line, line.working) for line in lines]
    busy = sum(len(steps) for _, steps in working)
    for line, steps in working:
        for step in steps:
            step.left_s -= seconds / (line.law.slow(busy) * slowdown)
