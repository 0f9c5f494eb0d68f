"""An engine that emits tokens for nothing: what remains of a run with it is the control plane's cost."""

from __future__ import annotations

import torch
from torch import Tensor

from data.models import ModelSpec
from serving.engine.batch import SampledToken, StepPlan


class FreeModel:
    """Stands where a `ShardModel` stands; token i of a request is a function of its key and i."""

    hidden_dtype = torch.float32

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def forward(self, plan: StepPlan, hidden: Tensor | None) -> Tensor | None:
        """Nothing is computed."""
        return hidden

    def draw(self, logits: Tensor | None, plan: StepPlan) -> list[SampledToken]:
        """One token per sequence that wants one."""
        return [
            SampledToken(one.key, (one.key * 31 + one.output_index * 7) % self._spec.vocab, 0.0, [])
            for one in plan.sequences
            if one.sampling is not None
        ]
