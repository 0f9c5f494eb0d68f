"""The geometry of a model: its dimensions, its tensors, and along which unit each tensor is cut.

Vocabulary: a *unit* is what tensor parallelism deals out in whole pieces (query heads, KV heads,
FFN granules, vocabulary rows). `unit_range` is the only place that says which shard gets which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from data.errors import InvalidInput, UnsupportedModel

Family = Literal["llama", "mistral", "qwen2", "qwen3", "opt"]
Unit = Literal["head", "kv_head", "ffn", "vocab"]

_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "OPTForCausalLM": "opt",
}
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 style frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Dimensions and options of a decoder, as read from a Hugging Face `config.json`.

    `dtype` is the dtype of the stored weights; `max_positions` bounds prompt + output tokens.
    """

    name: str
    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    dtype: str = "float32"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        positive = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_positions")
        for field in positive:
            if getattr(self, field) < 1:
                raise InvalidInput(f"{self.name}: {field} must be at least 1, not {getattr(self, field)}")
        if self.heads % self.kv_heads:
            raise InvalidInput(f"{self.name}: {self.heads} heads are not a multiple of {self.kv_heads} KV heads")
        if self.dtype not in _DTYPE_BYTES:
            raise UnsupportedModel(f"{self.name}: dtype {self.dtype} is not one of {', '.join(_DTYPE_BYTES)}")

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one stored weight element."""
        return _DTYPE_BYTES[self.dtype]

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are RMS-normalised per head (Qwen3)."""
        return self.family == "qwen3"

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, each tensor counted once."""
        return sum(tensor.elements for tensor in tensors(self)) * self.dtype_bytes

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype_bytes

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_json` inverts it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelSpec:
        """Inverse of `to_json`. Raises `InvalidInput` on unknown or missing fields."""
        fields = dict(value)
        scaling = fields.pop("rope_scaling", None)
        fields["eos_token_ids"] = tuple(fields.get("eos_token_ids", ()))
        try:
            return cls(**fields, rope_scaling=RopeScaling(**scaling) if scaling else None)
        except TypeError as error:
            raise InvalidInput(f"not a model spec: {error}") from error

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], *, name: str = "") -> ModelSpec:
        """Read a Hugging Face `config.json` mapping.

        Raises `UnsupportedModel` for an architecture or option without an implementation here,
        `InvalidInput` for a missing field.
        """
        architecture = (config.get("architectures") or ["(none)"])[0]
        family = _FAMILIES.get(architecture)
        if family is None:
            raise UnsupportedModel(
                f"architecture {architecture} is not supported; supported: {', '.join(sorted(_FAMILIES))}"
            )
        try:
            return _read_opt(config, name) if family == "opt" else _read_rotary(config, family, name)
        except KeyError as error:
            raise InvalidInput(f"config.json of {name or architecture} lacks the field {error}") from error


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _stored_dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def _read_rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Both spellings: `rope_theta` + `rope_scaling` (v4) and `rope_parameters` (v5)."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedModel(f"rope type {kind} is not supported; supported: default, llama3")
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )


def _read_rotary(config: Mapping[str, Any], family: Family, name: str) -> ModelSpec:
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"activation {config['hidden_act']} is not supported for {family}; supported: silu")
    heads = int(config["num_attention_heads"])
    theta, scaling = _read_rope(config)
    windowed = family == "mistral" or (family == "qwen2" and config.get("use_sliding_window", False))
    if windowed and family == "qwen2" and config.get("sliding_window"):
        raise UnsupportedModel("Qwen2 with use_sliding_window is not supported; set it to false")
    return ModelSpec(
        name=name or str(config.get("_name_or_path") or family),
        family=family,
        layers=int(config["num_hidden_layers"]),
        hidden=int(config["hidden_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        ffn=int(config["intermediate_size"]),
        vocab=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        dtype=_stored_dtype(config),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
        output_bias=family != "qwen2" and bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        sliding_window=config.get("sliding_window") if windowed else None,
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_token_ids(config.get("eos_token_id")),
    )


def _read_opt(config: Mapping[str, Any], name: str) -> ModelSpec:
    hidden = int(config["hidden_size"])
    if int(config.get("word_embed_proj_dim", hidden)) != hidden:
        raise UnsupportedModel("OPT with word_embed_proj_dim different from hidden_size (OPT-350m) is not supported")
    if not config.get("do_layer_norm_before", True):
        raise UnsupportedModel("OPT with do_layer_norm_before=false (OPT-350m) is not supported")
    if config.get("activation_function", "relu") != "relu":
        raise UnsupportedModel(f"OPT with activation {config['activation_function']} is not supported; supported: relu")
    heads = int(config["num_attention_heads"])
    bias = bool(config.get("enable_bias", True))
    return ModelSpec(
        name=name or str(config.get("_name_or_path") or "opt"),
        family="opt",
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn=int(config["ffn_dim"]),
        vocab=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        dtype=_stored_dtype(config),
        norm_eps=1e-5,
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_token_ids(config.get("eos_token_id")),
    )


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One checkpoint tensor: its name in the checkpoint, where it lives and how it is cut.

    `layer` is the decoder layer or None; `first`/`last` say that the first/last stage holds it
    (tied embeddings are held by both). `unit` None means replicated over the shards; otherwise
    dimension `dim` is cut by `unit_range`.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None = None
    first: bool = False
    last: bool = False
    unit: Unit | None = None
    dim: int = 0

    @property
    def elements(self) -> int:
        """Number of elements of the whole tensor."""
        product = 1
        for extent in self.shape:
            product *= extent
        return product


def unit_range(spec: ModelSpec, unit: Unit, shard: int, shards: int) -> tuple[int, int]:
    """Half-open range of elements along the cut dimension that shard `shard` of `shards` holds.

    Query heads are dealt in contiguous runs (sizes differ by at most one); a shard holds every KV
    head its query heads read, so KV heads are replicated when shards exceed them. FFN columns are
    cut into as many granules as there are heads and dealt like heads, so that any number of shards
    up to the heads works for any FFN width.
    """
    if not 0 <= shard < shards <= spec.heads:
        raise InvalidInput(f"shard {shard} of {shards}: {spec.name} can be cut into 1 to {spec.heads} shards")
    low, high = shard * spec.heads // shards, (shard + 1) * spec.heads // shards
    if unit == "head":
        return low * spec.head_dim, high * spec.head_dim
    if unit == "kv_head":
        group = spec.heads // spec.kv_heads
        return low // group * spec.head_dim, -(-high // group) * spec.head_dim
    if unit == "ffn":
        return low * spec.ffn // spec.heads, high * spec.ffn // spec.heads
    return shard * spec.vocab // shards, (shard + 1) * spec.vocab // shards


def kv_head_range(spec: ModelSpec, shard: int, shards: int) -> tuple[int, int]:
    """Half-open range of KV heads whose cache shard `shard` of `shards` keeps."""
    start, stop = unit_range(spec, "kv_head", shard, shards)
    return start // spec.head_dim, stop // spec.head_dim


def tensors(spec: ModelSpec) -> tuple[TensorSpec, ...]:
    """Every tensor of the checkpoint, in layer order, under its Hugging Face name."""
    outer, layer_of = (_opt_outer, _opt_layer) if spec.family == "opt" else (_rotary_outer, _rotary_layer)
    before, after = outer(spec)
    layers = [tensor for layer in range(spec.layers) for tensor in layer_of(spec, layer)]
    return (*before, *layers, *after)


def _linear(name: str, rows: int, columns: int, *, layer: int, unit: Unit, dim: int, bias: bool) -> list[TensorSpec]:
    """A weight cut along `dim`, and its bias: cut with the rows, or whole when columns are cut."""
    result = [TensorSpec(f"{name}.weight", (rows, columns), layer=layer, unit=unit, dim=dim)]
    if bias:
        result.append(TensorSpec(f"{name}.bias", (rows,), layer=layer, unit=unit if dim == 0 else None))
    return result


def _rotary_layer(spec: ModelSpec, layer: int) -> list[TensorSpec]:
    prefix = f"model.layers.{layer}"
    query, key_value = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    result = [TensorSpec(f"{prefix}.input_layernorm.weight", (spec.hidden,), layer=layer)]
    projections: tuple[tuple[str, int, Unit], ...] = (
        ("q", query, "head"),
        ("k", key_value, "kv_head"),
        ("v", key_value, "kv_head"),
    )
    for name, rows, unit in projections:
        result += _linear(
            f"{attention}.{name}_proj", rows, spec.hidden, layer=layer, unit=unit, dim=0, bias=spec.qkv_bias
        )
    if spec.qk_norm:
        result += [TensorSpec(f"{attention}.{name}_norm.weight", (spec.head_dim,), layer=layer) for name in "qk"]
    result += _linear(f"{attention}.o_proj", spec.hidden, query, layer=layer, unit="head", dim=1, bias=spec.output_bias)
    result.append(TensorSpec(f"{prefix}.post_attention_layernorm.weight", (spec.hidden,), layer=layer))
    for name in ("gate", "up"):
        result += _linear(
            f"{mlp}.{name}_proj", spec.ffn, spec.hidden, layer=layer, unit="ffn", dim=0, bias=spec.mlp_bias
        )
    result += _linear(f"{mlp}.down_proj", spec.hidden, spec.ffn, layer=layer, unit="ffn", dim=1, bias=spec.mlp_bias)
    return result


def _rotary_outer(spec: ModelSpec) -> tuple[list[TensorSpec], list[TensorSpec]]:
    tied = spec.tied_embeddings
    table = (spec.vocab, spec.hidden)
    before = [TensorSpec("model.embed_tokens.weight", table, first=True, last=tied, unit="vocab")]
    after = [TensorSpec("model.norm.weight", (spec.hidden,), last=True)]
    if not tied:
        after.append(TensorSpec("lm_head.weight", table, last=True, unit="vocab"))
    return before, after


def _opt_layer(spec: ModelSpec, layer: int) -> list[TensorSpec]:
    prefix = f"model.decoder.layers.{layer}"
    attention, bias = f"{prefix}.self_attn", spec.qkv_bias
    result: list[TensorSpec] = []
    for name in ("q", "k", "v"):
        unit: Unit = "head" if name == "q" else "kv_head"
        result += _linear(
            f"{attention}.{name}_proj", spec.hidden, spec.hidden, layer=layer, unit=unit, dim=0, bias=bias
        )
    result += _linear(f"{attention}.out_proj", spec.hidden, spec.hidden, layer=layer, unit="head", dim=1, bias=bias)
    result += _linear(f"{prefix}.fc1", spec.ffn, spec.hidden, layer=layer, unit="ffn", dim=0, bias=bias)
    result += _linear(f"{prefix}.fc2", spec.hidden, spec.ffn, layer=layer, unit="ffn", dim=1, bias=bias)
    for norm in ("self_attn_layer_norm", "final_layer_norm"):
        result += [TensorSpec(f"{prefix}.{norm}.{part}", (spec.hidden,), layer=layer) for part in ("weight", "bias")]
    return result


def _opt_outer(spec: ModelSpec) -> tuple[list[TensorSpec], list[TensorSpec]]:
    decoder, tied = "model.decoder", spec.tied_embeddings
    table = (spec.vocab, spec.hidden)
    before = [
        TensorSpec(f"{decoder}.embed_tokens.weight", table, first=True, last=tied, unit="vocab"),
        # OPT's table has two rows more than positions: the published offset of 2.
        TensorSpec(f"{decoder}.embed_positions.weight", (spec.max_positions + 2, spec.hidden), first=True),
    ]
    after = [TensorSpec(f"{decoder}.final_layer_norm.{part}", (spec.hidden,), last=True) for part in ("weight", "bias")]
    if not tied:
        after.append(TensorSpec("lm_head.weight", table, last=True, unit="vocab"))
    return before, after
