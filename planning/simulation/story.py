"""What happens to a simulated fleet, and what it does about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data.layout import ParallelConfig

HappeningKind = Literal["notice", "kill", "add"]


@dataclass(frozen=True, slots=True)
class Happening:
    """At `time_s` an instance is told to leave in `grace_s`, is killed without a word, or is started."""

    time_s: float
    kind: HappeningKind
    instance: str
    grace_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LayoutChange:
    """From `started_s` on a change was prepared, at `paused_s` old replicas stopped, at `done_s` it was in force."""

    started_s: float
    paused_s: float
    done_s: float
    config: ParallelConfig
    recovery: bool
    moved: int
    replayed: int
