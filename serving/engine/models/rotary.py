"""Llama, Mistral, Qwen2 and Qwen3: rotary positions, RMS norms, gated MLP, grouped heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from data.models import ModelSpec, RopeScaling
from serving.engine.kv_cache import KvCache
from serving.engine.layers import Attention, Parts, Turn, VocabEmbedding, VocabHead, make_attention
from serving.engine.step import StepTensors


class RotaryDecoder:
    """Options come from the spec: biases, q/k norm (Qwen3), sliding window (Mistral), RoPE scaling."""

    def __init__(self, parts: Parts, cache: KvCache) -> None:
        spec, place = parts.spec, parts.place
        self._parts = parts
        table = "model.embed_tokens.weight"
        if place.first:
            self._embedding = VocabEmbedding(parts, table)
        if place.last:
            self._norm = parts.vector("model.norm.weight")
            self._head = VocabHead(parts, table if spec.tied_embeddings else "lm_head.weight")
        self._rotations = rotations(spec, cache.device, parts.numerics.dtype)
        attention = make_attention(parts, cache)
        self._layers = [_RotaryLayer(parts, attention, layer) for layer in range(*place.layers)]

    def embed(self, step: StepTensors) -> Tensor:
        """See `Decoder.embed`."""
        return self._embedding(step.tokens)

    def run_layers(self, hidden: Tensor, step: StepTensors) -> Tensor:
        """See `Decoder.run_layers`."""
        cos, sin = (table.index_select(0, step.positions)[:, None] for table in self._rotations)
        delta: Tensor | None = None
        for layer in self._layers:
            hidden, delta = layer(hidden, delta, (cos, sin), step)
        return hidden if delta is None else hidden + delta

    def logits(self, hidden: Tensor) -> Tensor | None:
        """See `Decoder.logits`."""
        return self._head(self._parts.numerics.rms_norm(hidden, self._norm, self._parts.spec.norm_eps))


class _RotaryLayer:
    def __init__(self, parts: Parts, attention: Attention, layer: int) -> None:
        spec, prefix = parts.spec, f"model.layers.{layer}"
        self._numerics, self._attention, self._layer = parts.numerics, attention, layer
        self._eps, self._head_dim = spec.norm_eps, spec.head_dim
        self._input_norm = parts.vector(f"{prefix}.input_layernorm.weight")
        self._post_norm = parts.vector(f"{prefix}.post_attention_layernorm.weight")
        self._qkv = parts.column_linear(*(f"{prefix}.self_attn.{name}_proj" for name in "qkv"))
        self._out = parts.row_linear(f"{prefix}.self_attn.o_proj", "head")
        # Apart, as they are resident: side by side they would be a second copy of most of the model.
        self._gate, self._up = (parts.column_linear(f"{prefix}.mlp.{name}_proj") for name in ("gate", "up"))
        self._down = parts.row_linear(f"{prefix}.mlp.down_proj", "ffn")
        norms = "qk" if spec.qk_norm else ""
        self._qk_norm = [parts.vector(f"{prefix}.self_attn.{name}_norm.weight") for name in norms]

    def __call__(self, hidden: Tensor, delta: Tensor | None, turn: Turn, step: StepTensors) -> tuple[Tensor, Tensor]:
        """Takes and returns activations as (hidden, what is still to be added to it): the next norm adds it."""
        if delta is None:
            normed = self._numerics.rms_norm(hidden, self._input_norm, self._eps)
        else:
            hidden, normed = self._numerics.add_rms_norm(hidden, delta, self._input_norm, self._eps)
        delta = self._out(self._attend(normed, turn, step))
        hidden, normed = self._numerics.add_rms_norm(hidden, delta, self._post_norm, self._eps)
        return hidden, self._down(self._numerics.gate(self._gate(normed), self._up(normed)))

    def _attend(self, normed: Tensor, turn: Turn, step: StepTensors) -> Tensor:
        heads, kv_heads = self._attention.heads, self._attention.kv_heads
        projected = self._qkv(normed).unflatten(-1, (heads + 2 * kv_heads, self._head_dim))
        q, k, v = projected.split((heads, kv_heads, kv_heads), 1)
        if self._qk_norm:
            q, k = (self._numerics.rms_norm(x, w, self._eps) for x, w in zip((q, k), self._qk_norm, strict=True))
        return self._attention(self._layer, q, k, v, turn, step)


def rotations(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin `[max_positions, head_dim / 2]`, computed on the CPU so that every device has the same.

    Angles are rounded to float32 as the models' reference implementation does.
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    if spec.rope_scaling is not None:
        frequencies = _scaled(frequencies, spec.rope_scaling)
    angles = (torch.arange(spec.max_positions).float()[:, None] * frequencies).double()
    return angles.cos().to(device=device, dtype=dtype), angles.sin().to(device=device, dtype=dtype)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
