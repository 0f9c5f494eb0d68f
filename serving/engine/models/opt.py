"""OPT: learned positions, layer norms with bias before each block, ReLU MLP, one KV head per head."""

from __future__ import annotations

from torch import Tensor

from serving.engine.kv_cache import KvCache
from serving.engine.layers import Attention, Parts, VocabEmbedding, VocabHead, make_attention
from serving.engine.step import StepTensors

_POSITION_OFFSET = 2  # the first two rows of the published table are padding


class OptDecoder:
    """OPT with the layer norm before the blocks (all sizes but 350m)."""

    def __init__(self, parts: Parts, cache: KvCache) -> None:
        spec, place = parts.spec, parts.place
        self._parts = parts
        table = "model.decoder.embed_tokens.weight"
        if place.first:
            self._embedding = VocabEmbedding(parts, table)
            self._positions = parts.vector("model.decoder.embed_positions.weight")
        if place.last:
            self._norm = _LayerNorm(parts, "model.decoder.final_layer_norm")
            self._head = VocabHead(parts, table if spec.tied_embeddings else "lm_head.weight")
        attention = make_attention(parts, cache)
        self._layers = [_OptLayer(parts, attention, layer) for layer in range(*place.layers)]

    def embed(self, step: StepTensors) -> Tensor:
        """See `Decoder.embed`."""
        return self._embedding(step.tokens) + self._positions[step.positions + _POSITION_OFFSET]

    def run_layers(self, hidden: Tensor, step: StepTensors) -> Tensor:
        """See `Decoder.run_layers`."""
        for layer in self._layers:
            hidden = layer(hidden, step)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        """See `Decoder.logits`."""
        return self._head(self._norm(hidden))


class _LayerNorm:
    def __init__(self, parts: Parts, name: str) -> None:
        self._numerics, self._eps = parts.numerics, parts.spec.norm_eps
        self._weight, self._bias = parts.vector(f"{name}.weight"), parts.vector(f"{name}.bias")

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._numerics.layer_norm(hidden, self._weight, self._bias, self._eps)


class _OptLayer:
    def __init__(self, parts: Parts, attention: Attention, layer: int) -> None:
        prefix = f"model.decoder.layers.{layer}"
        self._attention, self._layer, self._head_dim = attention, layer, parts.spec.head_dim
        self._attention_norm = _LayerNorm(parts, f"{prefix}.self_attn_layer_norm")
        self._mlp_norm = _LayerNorm(parts, f"{prefix}.final_layer_norm")
        self._qkv = parts.column_linear(*(f"{prefix}.self_attn.{name}_proj" for name in "qkv"))
        self._out = parts.row_linear(f"{prefix}.self_attn.out_proj", "head")
        self._up = parts.column_linear(f"{prefix}.fc1")
        self._down = parts.row_linear(f"{prefix}.fc2", "ffn")

    def __call__(self, hidden: Tensor, step: StepTensors) -> Tensor:
        heads, kv_heads = self._attention.heads, self._attention.kv_heads
        projected = self._qkv(self._attention_norm(hidden)).unflatten(-1, (heads + 2 * kv_heads, self._head_dim))
        q, k, v = projected.split((heads, kv_heads, kv_heads), 1)
        hidden = hidden + self._out(self._attention(self._layer, q, k, v, None, step))
        return hidden + self._down(self._up(self._mlp_norm(hidden)).relu())
