"""An engine that emits tokens for nothing: what remains of a run with it is the control plane's cost."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from data.models import ModelSpec
from serving.engine.batch import SampledToken, StepPlan

CLOCK_S = 16.0  # in single precision, as log-probabilities travel, a time below this is exact to a microsecond


class FreeModel:
    """Stands where a `ShardModel` stands; token i of a request is a function of its key and i.

    The log-probability of a token is the monotonic clock at its draw, modulo `CLOCK_S`: whoever
    receives it on the same machine can tell how old it is. A step takes `step_s` at least.
    """

    def __init__(self, spec: ModelSpec, step_s: float = 0.0) -> None:
        self.spec, self._step_s = spec, step_s
        self._due_s = time.monotonic()

    @property
    def hidden_dtype(self) -> torch.dtype:
        """As of a model that computes."""
        return torch.float32

    def rows(self, plan: StepPlan) -> int:
        """One row per sequence, to have something to hand on."""
        return len(plan.sequences)

    def forward(self, plan: StepPlan, hidden: Tensor | None) -> Tensor | None:
        """Nothing is computed."""
        return torch.zeros(self.rows(plan), self.spec.hidden) if hidden is None else hidden

    def draw(self, logits: Tensor | None, plan: StepPlan) -> list[SampledToken]:
        """One token per sequence that wants one."""
        self._keep_pace()
        clock = time.monotonic() % CLOCK_S
        return [
            SampledToken(one.key, (one.key * 31 + one.output_index * 7) % self.spec.vocab, clock, [])
            for one in plan.sequences
            if one.sampling is not None
        ]

    def close(self) -> None:
        """There is nothing to let go of."""

    def _keep_pace(self) -> None:
        now_s = time.monotonic()
        if now_s < self._due_s:
            time.sleep(self._due_s - now_s)
        # a late step is made up for by shorter ones, within reason: the pace is an average
        self._due_s = max(self._due_s, now_s - 10 * self._step_s) + self._step_s
