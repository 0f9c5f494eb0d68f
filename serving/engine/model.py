"""The computation of one place: a step plan and activations in, activations or logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from data.errors import InvalidInput
from data.models import ModelSpec
from serving.engine.batch import SampledToken, StepPlan
from serving.engine.blocks import blocks_for
from serving.engine.exact import ExactNumerics
from serving.engine.graphs import Compute, DecodeGraphs, Record
from serving.engine.kernels import fused_on
from serving.engine.kv_cache import KvCache
from serving.engine.layers import Parts
from serving.engine.models import Decoder, make_decoder
from serving.engine.native import FusedNumerics, NativeNumerics
from serving.engine.numerics import Numerics
from serving.engine.place import Communicator, Place, Rehearsed
from serving.engine.sampler import sample, warm_up
from serving.engine.step import StepTensors, on_device


class ShardModel:
    """The layers of `place` with their weights, working on `cache`.

    `weights` come from `load_weights` (or from another place); `numerics` is `exact`, `native` or
    `auto`. Exact numerics keep a rounded float64 copy of the matrices, made here. `rest_s` as for `Rehearsed`:
    while this is made and warmed, others of the process have steps to compute.
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
        timeout_s: float = 20.0,
        rest_s: float = 0.0,
    ) -> None:
        self.spec, self.place, self._cache, self._comm = spec, place, cache, Rehearsed(comm)
        self._timeout_s, self._rest_s = timeout_s, rest_s
        self._numerics = make_numerics(numerics, spec, cache.dtype, cache.device)
        with self._comm.resting(rest_s):
            self._decoder = make_decoder(Parts(spec, place, weights, self._numerics, self._comm), cache)
        self._graphs: DecodeGraphs | None = None

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype of the activations between stages."""
        return self._numerics.dtype

    @staticmethod
    def rows(plan: StepPlan) -> int:
        """Rows of the activations of a step: its tokens."""
        return sum(len(sequence.tokens) for sequence in plan.sequences)

    @torch.inference_mode()
    def warm(self, sizes: Sequence[int]) -> dict[int, float]:
        """Record decode steps of these batch sizes, so that from now on they are replayed; milliseconds each took.
        Also draws a token: what is loaded for that would hold the first step up.

        Collective over the shards, in any thread, before the first `forward` or between two; touches nobody's
        KV, and runs no kernel that waits for another shard: an older layout may be at work. Does nothing where
        steps cannot be recorded: on a CPU, or with exact numerics.
        """
        if not self._numerics.paged or self._cache.device.type != "cuda":
            return {}
        if self._graphs is None:
            self._graphs = self._recordings()
        if self.place.last and not self.place.shard:
            warm_up(self._cache.device, self.spec.vocab)
        with self._comm.resting(self._rest_s):
            return self._graphs.capture(sizes)

    def close(self) -> None:
        """No step is computed any more: let go of what is recorded."""
        if self._graphs is not None:
            self._graphs.close()

    def _recordings(self, record: Record | None = None) -> DecodeGraphs:
        return DecodeGraphs(
            _decoding(self._decoder, self.place),
            self._cache,
            width=None if self.place.first else self.spec.hidden,
            rehearsal=self._comm.silenced,
            most_blocks=min(self._cache.blocks, blocks_for(self.spec.max_positions, self._cache.block_tokens)),
            record=record,
        )

    @torch.inference_mode()
    def forward(self, plan: StepPlan, hidden: Tensor | None) -> Tensor | None:
        """Run the place's layers for one step and cache its keys and values.

        The first stage ignores `hidden`; others take `[rows, hidden]` from the stage before. A stage
        that is not the last returns such activations, the same on every shard. The last returns, on
        shard 0, float32 logits `[sampled, vocab]` of the sequences with `sampling` set, in plan order,
        valid until the next step; None on other shards or if there are none.
        """
        if self._graphs is not None and (recorded := self._graphs.step_for(plan)) is not None:
            output = recorded.run(plan, hidden)
            if output is None or self.place.last:
                return output if output is None else sampled_rows(output, plan)
            # Activations may still be on their way to the next stage when the next step begins.
            return output.clone()
        step = StepTensors.of(
            plan,
            block_tokens=self._cache.block_tokens,
            window=self.spec.sliding_window,
            device=self._cache.device,
            paged=self._numerics.paged,
        )
        hidden = _run_layers(self._decoder, self.place, step, hidden)
        if not self.place.last:
            return hidden
        return self._decoder.logits(hidden.index_select(0, step.sampled)) if len(step.sampled) else None

    def draw(self, logits: Tensor | None, plan: StepPlan) -> list[SampledToken]:
        """The tokens that `sample` draws from what `forward` returned. Raises `TimeoutError` if the device hangs."""
        if logits is None:
            return []
        return sample(logits, plan, exact=not isinstance(self._numerics, NativeNumerics), timeout_s=self._timeout_s)


def _run_layers(decoder: Decoder, place: Place, step: StepTensors, hidden: Tensor | None) -> Tensor:
    if place.first:
        hidden = decoder.embed(step)
    if hidden is None:
        raise ValueError("a stage after the first needs the activations of the stage before it")
    return decoder.run_layers(hidden, step)


def sampled_rows(logits: Tensor, plan: StepPlan) -> Tensor | None:
    """Of logits of all rows of a plan those that are wanted."""
    last = list(accumulate(len(sequence.tokens) for sequence in plan.sequences))
    wanted = [row - 1 for row, sequence in zip(last, plan.sequences, strict=True) if sequence.sampling is not None]
    if len(wanted) == len(logits):
        return logits
    return logits.index_select(0, on_device(np.array(wanted, np.int64), logits.device)) if wanted else None


def _decoding(decoder: Decoder, place: Place) -> Compute:
    """A step all of whose rows are sampled. Not a method: a model that its recordings refer to would only go with
    the next garbage collection, and its memory and groups with it, at whatever moment that comes.
    """

    def compute(step: StepTensors, hidden: Tensor | None) -> Tensor | None:
        hidden = _run_layers(decoder, place, step, hidden)
        return decoder.logits(hidden) if place.last else hidden

    return compute


def make_numerics(name: str, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Numerics:
    """`exact`, `native`, or `auto`: exact on the CPU, native elsewhere. Raises `InvalidInput`.

    `framework` is native without own kernels, to compare with.
    """
    chosen = ("exact" if device.type == "cpu" else "native") if name == "auto" else name
    if chosen == "native":
        return FusedNumerics(dtype) if fused_on(device) else NativeNumerics(dtype)
    if chosen == "framework":
        return NativeNumerics(dtype)
    if chosen != "exact":
        raise InvalidInput(f"numerics {name!r} is unknown; choose exact, native or auto")
    if dtype != torch.float32:
        raise InvalidInput(f"exact numerics work in float32, not {dtype}; set dtype=float32 or numerics=native")
    return ExactNumerics(spec)
