"""What a family of models has to provide."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from serving.engine.step import StepTensors


class Decoder(Protocol):
    """The layers of one place. `embed` exists on the first stage, `logits` on the last."""

    def embed(self, step: StepTensors) -> Tensor:
        """Activations `[n, hidden]` of the step's tokens."""
        ...

    def run_layers(self, hidden: Tensor, step: StepTensors) -> Tensor:
        """The place's decoder layers."""
        ...

    def logits(self, hidden: Tensor) -> Tensor | None:
        """float32 `[rows, vocab]` on shard 0, None on the others."""
        ...
