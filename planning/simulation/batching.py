"""Which tokens each step computes, by count: the rules of the engine's scheduler without the tokens.

Continuous batching with chunked prefill over paged KV. Older requests come first in everything; when KV runs
out the youngest gives its blocks up and is computed again later. What is simulated here is tested against the
scheduler itself.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from planning.load import Work
from planning.step_laws import Mix, mix_of


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one replica takes: requests that hold KV, tokens of a step, KV blocks, steps under way at once."""

    max_batch: int
    step_tokens: int
    block_tokens: int
    blocks: int
    plans_in_flight: int = 1

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)


@dataclass(slots=True, eq=False)
class Job:
    """A request: `output` of `most` tokens are there, `cached` of the known ones have KV, in `blocks` blocks.

    Prompt and output must fit into the model's context and into the KV of a replica. Whoever is not done at `due_s`
    is `late`, and is not computed any more.
    """

    key: int
    prompt: int
    most: int
    output: int = 0
    cached: int = 0
    blocks: int = 0
    order: int = 0
    in_flight: bool = False
    due_s: float = inf
    late: bool = False

    @property
    def known(self) -> int:
        """Prompt and output so far."""
        return self.prompt + self.output

    @property
    def work(self) -> Work:
        """What is left to do, as dispatch counts it: the prompt has been prefilled once there is output."""
        return Work(0 if self.output else self.prompt, self.most - self.output)

    @property
    def done(self) -> bool:
        """Whether all tokens are there."""
        return self.output >= self.most

    @property
    def decoding(self) -> bool:
        """Whether its next step is a single token."""
        return not self.in_flight and self.known - self.cached == 1

    def lose(self) -> None:
        """Its KV is gone, and with it whatever step it was in."""
        self.cached = self.blocks = 0
        self.in_flight = False


@dataclass(frozen=True, slots=True)
class Part:
    """`count` tokens of a job from position `start` on; `draws`: they give the next token."""

    job: Job
    start: int
    count: int
    draws: bool


def mix(parts: Sequence[Part], block_tokens: int) -> Mix:
    """What a step of these parts costs by."""
    return mix_of(((part.start, part.count) for part in parts), block_tokens)


class Batcher:
    """The queue, the running jobs and the KV blocks of one replica."""

    def __init__(self, limits: BatchLimits) -> None:
        self.limits, self.free = limits, limits.blocks
        self.running: list[Job] = []
        self.waiting: list[Job] = []
        self._arrivals = 0

    @property
    def jobs(self) -> list[Job]:
        """Everything that is here, running or not."""
        return [*self.running, *self.waiting]

    def add(self, job: Job) -> None:
        """Queue a job that has no KV."""
        self._register(job)
        self.waiting.append(job)

    def adopt(self, job: Job, cached: int, blocks: int) -> None:
        """Run a job whose first `cached` tokens are in `blocks` blocks; its last token is computed again."""
        self._register(job)
        self.free -= blocks
        job.blocks, job.cached = blocks, min(cached, job.known - 1)
        self.running.append(job)

    def schedule(self) -> list[Part]:
        """The next step, of jobs that are in no step under way; empty if nothing can be computed now."""
        step = _Step(self.limits, len(self.running) + len(self.waiting), sum(job.decoding for job in self.running))
        for job in sorted(self.running, key=lambda one: one.order):
            if not job.in_flight and job in self.running:  # an earlier one of this loop may have taken its blocks
                self._advance(job, step)
        while step.open and self._admit():
            self._advance(self.running[-1], step)
        return step.parts

    def complete(self, parts: Sequence[Part]) -> list[Job]:
        """Account for a finished step; returns the jobs that have a token more. Those with all leave, and the late."""
        drew = []
        for part in parts:
            job = part.job
            job.in_flight, job.cached = False, part.start + part.count
            if job.late:
                self._leave(job)
            elif part.draws:
                job.output += 1
                drew.append(job)
                if job.done:
                    self._leave(job)
        return drew

    @property
    def due_s(self) -> float:
        """When the first of the jobs is due; infinite without any."""
        return min((job.due_s for job in self.jobs if not job.late), default=inf)

    def expire(self, now_s: float) -> None:
        """Let go of whoever is due; of those in a step, after it."""
        for job in self.jobs:
            if job.due_s <= now_s and not job.late:
                job.late = True
                if not job.in_flight:
                    self._leave(job)

    def _register(self, job: Job) -> None:
        job.order = self._arrivals
        self._arrivals += 1

    def _advance(self, job: Job, step: _Step) -> None:
        count = step.share(job)
        if count and self._grow(job, job.cached + count):
            step.take(Part(job, job.cached, count, draws=count == job.known - job.cached))

    def _admit(self) -> bool:
        if not self.waiting or len(self.running) >= self.limits.max_batch:
            return False
        if self.limits.blocks_for(self.waiting[0].known) > self.free:
            return False
        self.running.append(self.waiting.pop(0))
        return True

    def _grow(self, job: Job, tokens: int) -> bool:
        """Blocks for `tokens` tokens, from younger jobs if need be; False if it has to wait."""
        missing = self.limits.blocks_for(tokens) - job.blocks
        while missing > self.free:
            younger = [one for one in self.running if one.order > job.order and not one.in_flight and one.blocks]
            if not younger:
                return False
            self._preempt(max(younger, key=lambda one: one.order))
        job.blocks += max(missing, 0)
        self.free -= max(missing, 0)
        return True

    def _preempt(self, job: Job) -> None:
        self.running.remove(job)
        self.free += job.blocks
        job.lose()
        insort(self.waiting, job, key=lambda one: one.order)

    def _leave(self, job: Job) -> None:
        (self.running if job in self.running else self.waiting).remove(job)
        self.free += job.blocks
        job.lose()


class _Step:
    """Tokens and jobs a step has room for. Prefill leaves one token for every decoding job."""

    def __init__(self, limits: BatchLimits, jobs: int, decoding: int) -> None:
        self.parts: list[Part] = []
        self._tokens, self._decoding = limits.step_tokens, decoding
        self._most = -(-min(limits.max_batch, jobs) // limits.plans_in_flight)

    @property
    def open(self) -> bool:
        return self._tokens > 0 and len(self.parts) < self._most

    def share(self, job: Job) -> int:
        """How many tokens of a job the step takes."""
        if not self.open:
            return 0
        if job.decoding:
            self._decoding -= 1
            return 1
        kept = min(max(self._decoding, 0), self._tokens - 1)
        return min(job.known - job.cached, self._tokens - kept)

    def take(self, part: Part) -> None:
        """Add a job's part."""
        part.job.in_flight = True
        self.parts.append(part)
        self._tokens -= part.count
