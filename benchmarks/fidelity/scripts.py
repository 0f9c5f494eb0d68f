"""The runs: who asks for what and when, what happens to the fleet, and which layouts it goes through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from data.synthesis import Uniform, synthetic_workload
from data.workload import Workload
from planning.simulation.story import HappeningKind

INSTANCES = 4
MAX_BATCH = 8


@dataclass(frozen=True, slots=True)
class Deed:
    """Something done `time_s` after the start: to the `victim`-th of the instances that work and stay, by name."""

    time_s: float
    kind: HappeningKind
    victim: int = 0
    grace_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Script:
    """One run. `layouts` are replicas × stages × shards by number of instances; token numbers are ranges."""

    name: str
    layouts: Mapping[int, str]
    requests: int
    rate_rps: float
    cv: float
    prompts: tuple[int, int]
    outputs: tuple[int, int]
    deeds: tuple[Deed, ...]

    def workload(self, seed: int) -> Workload:
        """The requests of a seed."""
        return synthetic_workload(
            seed,
            requests=self.requests,
            rate_rps=self.rate_rps,
            cv=self.cv,
            inputs=Uniform(*self.prompts),
            outputs=Uniform(*self.outputs),
            name=self.name,
        )


def _deeds(*deeds: tuple[float, HappeningKind, int]) -> tuple[Deed, ...]:
    return tuple(Deed(at, kind, victim, grace_s=3.0 if kind == "notice" else 0.0) for at, kind, victim in deeds)


SCRIPTS = (
    Script(
        "replicas come and go",
        {4: "3x1x1", 3: "2x1x1", 2: "1x1x1", 1: "1x1x1"},
        200, 2.0, 1.0, (8, 48), (24, 80),
        _deeds((10, "notice", 0), (24, "kill", 1), (36, "add", 0), (50, "add", 0), (64, "kill", 0)),
    ),
    Script(
        "bursts",
        {4: "2x1x1", 3: "2x1x1", 2: "2x1x1", 1: "1x1x1"},
        200, 1.8, 2.5, (8, 48), (24, 80),
        _deeds((12, "kill", 0), (28, "notice", 1), (44, "notice", 0), (58, "add", 0), (72, "add", 0)),
    ),
    Script(
        "long prompts",
        {4: "2x1x1", 3: "1x2x1", 2: "1x1x1", 1: "1x1x1"},
        130, 1.0, 1.0, (40, 360), (12, 48),
        _deeds((15, "notice", 1), (40, "add", 0), (62, "kill", 0), (84, "add", 0), (105, "notice", 0)),
    ),
    Script(
        "pipelines",
        {4: "2x2x1", 3: "1x3x1", 2: "1x2x1", 1: "1x1x1"},
        150, 1.5, 1.0, (8, 48), (16, 40),
        _deeds((14, "notice", 2), (32, "kill", 1), (50, "add", 0), (66, "add", 0), (82, "kill", 3)),
    ),
    Script(
        "shards",
        {4: "2x1x2", 3: "1x1x2", 2: "1x1x2", 1: "1x1x1"},
        150, 1.4, 1.0, (8, 48), (12, 36),
        _deeds((15, "kill", 2), (38, "add", 0), (60, "notice", 0), (84, "notice", 1), (104, "add", 0)),
    ),
    Script(
        "every shape",
        {4: "1x2x2", 3: "1x3x1", 2: "1x1x2", 1: "1x1x1"},
        130, 1.1, 1.5, (8, 64), (12, 36),
        _deeds((14, "notice", 3), (36, "notice", 0), (58, "add", 0), (78, "add", 0), (98, "kill", 1)),
    ),
)  # fmt: skip
