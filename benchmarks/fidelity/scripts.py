"""The runs: who asks for what and when, what happens to the fleet, and which layouts it goes through.

How much is asked for is said as a share of what the fleet was measured to serve: a script asks the same of a quick
machine as of a slow one. A fleet that mostly rests is no test of queues, and one that is asked for more than it can
do shows every error many times over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from data.synthesis import Uniform, synthetic_workload
from data.workload import Workload
from planning.simulation.story import HappeningKind
from serving.settings import EngineSettings

ENGINE = EngineSettings(kv_memory_bytes=8_000_000)
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
    """One run. `layouts` are replicas × stages × shards by number of instances; token numbers are ranges.

    Requests come for `duration_s`, as many as would take `load` of what the least of the layouts that the run goes
    through can serve; longer, until there are `least_requests`: of 500 the P99 is the fifth worst.
    """

    name: str
    layouts: Mapping[int, str]
    duration_s: float
    load: float
    cv: float
    prompts: tuple[int, int]
    outputs: tuple[int, int]
    deeds: tuple[Deed, ...]
    least_requests: int = 500

    def workload(self, seed: int, rate_rps: float) -> Workload:
        """The requests of a seed."""
        return synthetic_workload(
            seed,
            requests=max(self.least_requests, round(rate_rps * self.duration_s)),
            rate_rps=rate_rps,
            cv=self.cv,
            inputs=Uniform(*self.prompts),
            outputs=Uniform(*self.outputs),
            name=self.name,
        )

    @property
    def visited(self) -> tuple[str, ...]:
        """The layouts that the fleet goes through, in that order."""
        live = accumulate((1 if deed.kind == "add" else -1 for deed in self.deeds), initial=INSTANCES)
        return tuple(dict.fromkeys(self.layouts[count] for count in live))


def _deeds(*deeds: tuple[float, HappeningKind, int]) -> tuple[Deed, ...]:
    return tuple(Deed(at, kind, victim, grace_s=3.0 if kind == "notice" else 0.0) for at, kind, victim in deeds)


SCRIPTS = (
    Script(
        "replicas come and go",
        {4: "3x1x1", 3: "2x1x1", 2: "1x1x1", 1: "1x1x1"},
        130, 0.5, 1.0, (8, 48), (12, 40),
        _deeds((12, "notice", 0), (34, "kill", 1), (56, "add", 0), (78, "add", 0), (104, "kill", 0)),
    ),
    Script(
        "bursts",
        {4: "2x1x1", 3: "2x1x1", 2: "2x1x1", 1: "1x1x1"},
        130, 0.4, 2.5, (8, 48), (12, 40),
        _deeds((12, "kill", 0), (34, "notice", 1), (56, "notice", 0), (72, "add", 0), (94, "add", 0)),
    ),
    Script(
        "long prompts",
        {4: "2x1x1", 3: "1x2x1", 2: "1x1x1", 1: "1x1x1"},
        190, 0.5, 1.0, (40, 240), (8, 24),
        _deeds((15, "notice", 1), (45, "add", 0), (75, "kill", 0), (110, "add", 0), (150, "notice", 0)),
    ),
    Script(
        "pipelines",
        {4: "2x2x1", 3: "1x3x1", 2: "1x2x1", 1: "1x1x1"},
        130, 0.5, 1.0, (8, 48), (12, 32),
        _deeds((14, "notice", 2), (36, "kill", 1), (58, "add", 0), (80, "add", 0), (106, "kill", 3)),
    ),
    Script(
        "shards",
        {4: "2x1x2", 3: "1x1x2", 2: "1x1x2", 1: "1x1x1"},
        145, 0.5, 1.0, (8, 48), (10, 28),
        _deeds((15, "kill", 2), (40, "add", 0), (66, "notice", 0), (92, "notice", 1), (118, "add", 0)),
    ),
    Script(
        "every shape",
        {4: "1x2x2", 3: "1x3x1", 2: "1x1x2", 1: "1x1x1"},
        155, 0.45, 1.5, (8, 64), (10, 28),
        _deeds((14, "notice", 3), (40, "notice", 0), (66, "add", 0), (92, "add", 0), (120, "kill", 1)),
    ),
)  # fmt: skip
