"""The computation of one place: a step plan and activations in, activations or logits out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from data.errors import InvalidInput
from data.models import ModelSpec
from serving.engine.batch import StepPlan
from serving.engine.exact import ExactNumerics
from serving.engine.kv_cache import KvCache
from serving.engine.layers import Parts
from serving.engine.models import make_decoder
from serving.engine.native import NativeNumerics
from serving.engine.numerics import Numerics
from serving.engine.place import Communicator, Place
from serving.engine.step import StepTensors


class ShardModel:
    """The layers of `place` with their weights, working on `cache`.

    `weights` come from `load_weights` (or from another place); `numerics` is `exact`, `native` or
    `auto`. Exact numerics keep a rounded float64 copy of the matrices, made here.
    """

    def __init__(
        self,
        spec: ModelSpec,
        place: Place,
        weights: Mapping[str, Tensor],
        *,
        numerics: str,
        comm: Communicator,
        cache: KvCache,
    ) -> None:
        self.spec, self.place, self._cache, self._comm = spec, place, cache, comm
        self._numerics = make_numerics(numerics, spec, cache.dtype, cache.device)
        self._decoder = make_decoder(Parts(spec, place, weights, self._numerics, comm), cache)

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype of the activations between stages."""
        return self._numerics.dtype

    @staticmethod
    def rows(plan: StepPlan) -> int:
        """Rows of the activations of a step: its tokens."""
        return sum(len(sequence.tokens) for sequence in plan.sequences)

    @torch.inference_mode()
    def forward(self, plan: StepPlan, hidden: Tensor | None) -> Tensor | None:
        """Run the place's layers for one step and cache its keys and values.

        The first stage ignores `hidden`; others take `[rows, hidden]` from the stage before. A stage
        that is not the last returns such activations, the same on every shard. The last returns, on
        shard 0, float32 logits `[sampled, vocab]` of the sequences with `sampling` set, in plan order;
        None on other shards or if there are none.
        """
        step = StepTensors.of(
            plan, block_tokens=self._cache.block_tokens, window=self.spec.sliding_window, device=self._cache.device
        )
        if self.place.first:
            hidden = self._decoder.embed(step)
        if hidden is None:
            raise ValueError("a stage after the first needs the activations of the stage before it")
        hidden = self._decoder.run_layers(hidden, step)
        if not self.place.last:
            return hidden
        return self._decoder.logits(hidden.index_select(0, step.sampled)) if len(step.sampled) else None


def make_numerics(name: str, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Numerics:
    """`exact`, `native`, or `auto`: exact on the CPU, native elsewhere. Raises `InvalidInput`."""
    chosen = ("exact" if device.type == "cpu" else "native") if name == "auto" else name
    if chosen == "native":
        return NativeNumerics(dtype)
    if chosen != "exact":
        raise InvalidInput(f"numerics {name!r} is unknown; choose exact, native or auto")
    if dtype != torch.float32:
        raise InvalidInput(f"exact numerics work in float32, not {dtype}; set dtype=float32 or numerics=native")
    return ExactNumerics(spec)
