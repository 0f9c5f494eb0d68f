"""What the measuring processes are asked, and what they answer, as JSON lines."""

from __future__ import annotations

from typing import Any

import msgspec

from profiling.grid import Grid


class Campaign(msgspec.Struct, frozen=True, kw_only=True):
    """One profile. Every process of ranks 0 … world − 1 reads the same campaign and follows it in step.

    `checkpoint` is empty when only the model's geometry is known; `store` is a file for the
    rendezvous; `budget_s` bounds the time spent on steps.
    """

    model: dict[str, Any]
    checkpoint: str
    device: str
    dtype: str
    numerics: str
    threads: int
    block_tokens: int
    grid: Grid
    world: int
    store: str
    host: str
    budget_s: float
    timeout_s: float


class Line(msgspec.Struct, frozen=True, tag=True):
    """Base of what rank 0 writes to its standard output."""


class StepTime(Line, frozen=True, tag=True):
    """A row of `data.profile.STEPS`."""

    phase: str
    part: str
    layers: int
    shards: int
    batch: int
    tokens: int
    context: int
    time_ms: float
    spread_ms: float
    repeats: int


class LinkTime(Line, frozen=True, tag=True):
    """A row of `data.profile.LINKS`."""

    kind: str
    bytes: int
    time_ms: float
    repeats: int


class Progress(Line, frozen=True, tag=True):
    """`done` of `total` points are measured; `what` comes next."""

    what: str
    done: int
    total: int


class Finished(Line, frozen=True, tag=True):
    """The last line of a campaign that is complete. `skipped` points did not fit in the budget."""

    skipped: int


class Refused(Line, frozen=True, tag=True):
    """The campaign cannot be followed here; `reason` is a sentence for the user."""

    reason: str


Answer = StepTime | LinkTime | Progress | Finished | Refused
