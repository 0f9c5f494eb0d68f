from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InvalidInput, UnsupportedModel
from data.models import ModelSpec, RopeScaling, Unit, kv_head_range, tensors, unit_range

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], **SHAPE}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
FAMILIES = [
    pytest.param("llama", {**SHAPE, "attention_bias": True, "mlp_bias": True}, id="llama-with-biases"),
    pytest.param("llama", {**SHAPE, "tie_word_embeddings": True, "head_dim": 16}, id="llama-tied-wide-heads"),
    pytest.param("mistral", {**SHAPE, "sliding_window": 16}, id="mistral"),
    pytest.param("qwen2", SHAPE, id="qwen2"),
    pytest.param("qwen3", {**SHAPE, "head_dim": 16}, id="qwen3"),
    pytest.param("opt", {name: OPT[name] for name in OPT if name != "architectures"}, id="opt"),
    pytest.param(
        "opt",
        {**{name: OPT[name] for name in OPT if name != "architectures"}, "tie_word_embeddings": False},
        id="opt-untied",
    ),
]


def spec(**changes: Any) -> ModelSpec:
    return ModelSpec.from_hf_config({**LLAMA, **changes}, name="tiny")


@pytest.mark.parametrize(("family", "fields"), FAMILIES)
def test_tensors_are_the_state_dict_of_transformers(family: str, fields: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.AutoConfig.for_model(family, **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    read = ModelSpec.from_hf_config({**config.to_dict(), "architectures": [type(model).__name__]})
    if read.tied_embeddings:
        del expected["lm_head.weight"]

    assert {tensor.name: tensor.shape for tensor in tensors(read)} == expected
    assert read.weight_bytes == sum(parameter.numel() for parameter in model.parameters()) * read.dtype_bytes


@given(
    group=st.integers(1, 4),
    kv_heads=st.integers(1, 6),
    head_dim=st.sampled_from([1, 8]),
    ffn=st.integers(1, 97),
    vocab=st.integers(1, 97),
    data=st.data(),
)
def test_shards_cover_every_unit(
    group: int, kv_heads: int, head_dim: int, ffn: int, vocab: int, data: st.DataObject
) -> None:
    heads = group * kv_heads
    model = ModelSpec("m", "llama", 1, heads * head_dim, heads, kv_heads, head_dim, ffn, vocab, 8)
    shards = data.draw(st.integers(1, heads))
    extents: dict[Unit, int] = {"head": heads * head_dim, "ffn": ffn, "vocab": vocab}
    for unit, extent in extents.items():
        ranges = [unit_range(model, unit, shard, shards) for shard in range(shards)]
        assert [0, *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), extent]
    sizes = [stop - start for start, stop in (unit_range(model, "head", shard, shards) for shard in range(shards))]
    assert max(sizes) - min(sizes) <= head_dim
    assert min(sizes) >= head_dim


@given(group=st.integers(1, 4), kv_heads=st.integers(1, 6), data=st.data())
def test_a_shard_holds_the_kv_heads_that_its_query_heads_read(group: int, kv_heads: int, data: st.DataObject) -> None:
    model = ModelSpec("m", "llama", 1, 8, group * kv_heads, kv_heads, 4, 8, 8, 8)
    shards = data.draw(st.integers(1, model.heads))
    held: set[int] = set()
    for shard in range(shards):
        start, stop = unit_range(model, "head", shard, shards)
        read = {head // group for head in range(start // 4, stop // 4)}
        kept = set(range(*kv_head_range(model, shard, shards)))
        assert kept == read
        held |= kept
    assert held == set(range(kv_heads))


def test_kv_heads_are_replicated_when_shards_exceed_them() -> None:
    assert [kv_head_range(spec(), shard, 4) for shard in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]


@pytest.mark.parametrize(("shard", "shards"), [(-1, 2), (2, 2), (0, 5), (0, 0)])
def test_impossible_shards_are_refused(shard: int, shards: int) -> None:
    with pytest.raises(InvalidInput, match="1 to 4 shards"):
        unit_range(spec(), "head", shard, shards)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ],
)
def test_both_spellings_of_the_rope_base(fields: dict[str, Any]) -> None:
    read = spec(**fields)
    assert (read.rope_theta, read.rope_scaling) == (5e5, None)


def test_both_spellings_of_llama3_scaling() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    old = spec(rope_theta=5e5, rope_scaling=scaling)
    new = spec(rope_parameters={**scaling, "rope_theta": 5e5})
    assert old == new
    assert old.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**LLAMA, "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({**LLAMA, "architectures": []}, r"\(none\) is not supported"),
        ({**LLAMA, "hidden_act": "gelu"}, "activation gelu"),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn"}}, "rope type yarn"),
        ({**LLAMA, "dtype": "int8"}, "dtype int8"),
        (
            {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8},
            "set it to false",
        ),
        ({**OPT, "word_embed_proj_dim": 16}, "word_embed_proj_dim"),
        ({**OPT, "do_layer_norm_before": False}, "do_layer_norm_before"),
        ({**OPT, "activation_function": "gelu"}, "activation gelu"),
    ],
)
def test_what_has_no_implementation_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words):
        ModelSpec.from_hf_config(config)


def test_a_missing_field_is_named() -> None:
    config = {name: value for name, value in LLAMA.items() if name != "vocab_size"}
    with pytest.raises(InvalidInput, match="vocab_size"):
        ModelSpec.from_hf_config(config)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 0}, {"num_key_value_heads": 3}])
def test_impossible_dimensions_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        spec(**changes)


def test_eos_may_be_one_token_several_or_none() -> None:
    assert [spec(eos_token_id=value).eos_token_ids for value in (None, 2, [2, 3])] == [(), (2,), (2, 3)]


def test_only_mistral_reads_its_sliding_window() -> None:
    assert spec(architectures=["MistralForCausalLM"], sliding_window=16).sliding_window == 16
    assert spec(sliding_window=16).sliding_window is None


def test_json_round_trip() -> None:
    scaling = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    model = spec(rope_scaling={**scaling, "original_max_position_embeddings": 32}, eos_token_id=[1, 2])
    assert ModelSpec.from_json(model.to_json()) == model
    with pytest.raises(InvalidInput, match="not a model spec"):
        ModelSpec.from_json({**model.to_json(), "colour": "red"})
