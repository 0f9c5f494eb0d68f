"""Runs of several models: which groups host them, who asks for how much, and how soon it is to be answered.

How much is said as a share of what the fleet can do, and how soon in units of what a request takes, both by the
pace that the fleet was measured to have: a script asks the same of a quick machine as of a slow one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from data.deployment import Deployment, Hosted, SharedGroup
from data.synthesis import Uniform, synthetic_workload
from perennial.demo.setting import CPU
from planning.load import Pace, Work
from planning.simulation.shared_fleet import Ask, Shape

MAX_BATCH = 4
MODELS: Mapping[str, Mapping[str, Any]] = {
    "chat": CPU.model,
    "code": {**CPU.model, "layers": 3},
    "draft": {**CPU.model, "layers": 2, "hidden": 128, "heads": 4, "ffn": 256},
}
"""Arguments of `create_checkpoint` by name."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests for a model that would take `load` of the time of all groups, each to be answered within `slo` times
    what a mean one takes. Token numbers are ranges.
    """

    model: str
    load: float
    slo: float
    cv: float = 1.0
    prompts: tuple[int, int] = (8, 48)
    outputs: tuple[int, int] = (12, 40)

    @property
    def work(self) -> Work:
        """Of a mean request."""
        return Work(round(sum(self.prompts) / 2), round(sum(self.outputs) / 2))


@dataclass(frozen=True, slots=True)
class SharedScript:
    """One run; a model has the same stages and shards in every group that hosts it."""

    name: str
    groups: tuple[SharedGroup, ...]
    demands: tuple[Demand, ...]
    requests: int = 1200

    @property
    def deployment(self) -> Deployment:
        """Its groups, in the order in which they are built."""
        return Deployment(self.groups)

    @property
    def shapes(self) -> dict[str, Shape]:
        """How every model runs."""
        return {model: (model, group.stages, group.shards) for group in self.groups for model in group.models}

    def hosting(self, model: str) -> int:
        """How many groups host a model."""
        return sum(model in group.models for group in self.groups)

    @property
    def cover(self) -> tuple[str, ...]:
        """Models of which every group hosts exactly one, as few as can be; empty if there are none."""
        models = list(self.shapes)
        choices = (some for size in range(1, len(models) + 1) for some in combinations(models, size))
        fitting = (some for some in choices if all(len({*some} & {*group.models}) == 1 for group in self.groups))
        return next(fitting, ())

    def asks(self, seed: int, paces: Mapping[Shape, Pace]) -> list[Ask]:
        """The requests of a seed, on a fleet of this pace."""
        rates = {}
        for demand in self.demands:
            pace = paces[self.shapes[demand.model]]
            rates[demand.model] = demand.load * len(self.groups) / pace.device_s(demand.work)
        found = []
        for number, demand in enumerate(self.demands):
            share = rates[demand.model] / sum(rates.values())
            deadline_s = demand.slo * paces[self.shapes[demand.model]].alone_s(demand.work)
            workload = synthetic_workload(
                int(np.random.SeedSequence((seed, number)).generate_state(1)[0]),
                requests=round(share * self.requests),
                rate_rps=rates[demand.model],
                cv=demand.cv,
                inputs=Uniform(*demand.prompts),
                outputs=Uniform(*demand.outputs),
            )
            found += [
                Ask(one.arrival_s, demand.model, one.input_tokens, one.output_tokens, deadline_s)
                for one in workload.requests
            ]
        return sorted(found, key=lambda ask: ask.arrival_s)


def _groups(count: int, models: Sequence[str], stages: int = 1) -> tuple[SharedGroup, ...]:
    hosted = tuple(Hosted(model, MAX_BATCH, 1 / len(MODELS)) for model in models)
    return (SharedGroup(stages, 1, hosted),) * count


SHARED_SCRIPTS = (
    SharedScript(
        "two models, steady",
        _groups(4, ("chat", "code")),
        (Demand("chat", 0.35, 2.5), Demand("code", 0.3, 3.5)),
    ),
    SharedScript(
        "two models, bursts",
        _groups(4, ("chat", "code")),
        (Demand("chat", 0.3, 3.0, cv=3.0), Demand("code", 0.3, 3.5, cv=3.0)),
    ),
    SharedScript(
        "three models, one overloaded",
        (*_groups(2, ("chat", "draft")), *_groups(1, ("code",)), *_groups(1, ("code", "draft"))),
        (Demand("chat", 0.25, 3.0), Demand("code", 0.55, 4.0), Demand("draft", 0.1, 6.0)),
    ),
    SharedScript(
        "two models in pipelines",
        _groups(2, ("chat", "code"), stages=2),
        (Demand("chat", 0.3, 2.5, cv=1.5), Demand("code", 0.3, 3.5, cv=1.5)),
    ),
    SharedScript(
        "three models, partly shared",
        (*_groups(1, ("chat",)), *_groups(2, ("chat", "code")), *_groups(1, ("code", "draft"))),
        (Demand("chat", 0.4, 2.5), Demand("code", 0.3, 3.0), Demand("draft", 0.1, 5.0)),
    ),
)
