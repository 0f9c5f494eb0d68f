"""Where requests go on whose KV is moved or restored: on new replicas, or on running ones that have room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from planning.simulation.batching import Job
from planning.simulation.lines import Line

_GROWTH_TOKENS = 64  # room kept for what a request adds while it is copied into a running replica


def seat(
    jobs: Sequence[Job], new: Sequence[Line], inherits: Sequence[Sequence[int]], origin: Mapping[Job, int]
) -> list[Job]:
    """Adopt `jobs` on new replicas: on the heirs of the replica that each comes from (`origin`), but no replica
    takes more than its share. Returns those without a seat.
    """
    ordered = sorted(jobs, key=lambda job: job.key)
    share = -(-len(ordered) // len(new))
    heirs = {line.number: numbers for line, numbers in zip(new, inherits, strict=True)}
    left = []
    for job in ordered:
        seated = {line.number: len(line.batcher.running) for line in new}
        options = sorted(
            new,
            key=lambda one: (
                seated[one.number] >= share,
                origin.get(job) not in heirs[one.number],
                seated[one.number],
                one.number,
            ),
        )
        home = next((line for line in options if _fits(job, line)), None)
        if home is None:
            left.append(job)
        else:
            home.batcher.adopt(job, job.cached, home.limits.blocks_for(job.cached))
    return left


def _fits(job: Job, line: Line) -> bool:
    """Whether everyone there can still take its next token, unless it has all blocks that it will need."""
    limits = line.limits
    blocks, most = limits.blocks_for(job.cached), limits.blocks_for(job.prompt + job.most)
    growing = sum(one.blocks < limits.blocks_for(one.prompt + one.most) for one in line.batcher.running)
    return line.batcher.free >= blocks + growing + (blocks < most)


def join(jobs: Sequence[Job], kept: Sequence[Line]) -> list[Job]:
    """Adopt `jobs` on running replicas, the emptiest first, where there are blocks to spare. Returns the others."""
    loads = {line.number: len(line.batcher.jobs) for line in kept}
    by_number = {line.number: line for line in kept}
    left = []
    for job in sorted(jobs, key=lambda one: one.key):
        number = min(loads, key=lambda one: (loads[one], one), default=None)
        home = by_number[number] if number is not None else None
        blocks = home.limits.blocks_for(job.cached + _GROWTH_TOKENS) if home else 0
        if home is None or home.batcher.free < blocks:
            left.append(job)
            continue
        loads[home.number] += 1
        home.batcher.adopt(job, job.cached, blocks)
    return left
