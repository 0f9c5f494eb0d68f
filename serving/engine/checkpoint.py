"""Seeded random checkpoints in the Hugging Face layout: small models for demos and tests."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from data.errors import InvalidInput
from data.models import Family, ModelSpec, TensorSpec, tensors

_SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "opt": "OPTForCausalLM",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WRITERS = 4  # files that are drawn and written at once
_LOGIT_STD = 3.0
_ATTENTION_GAIN = 2.0  # peaked attention: what comes next depends on the whole context, not on the last token


def create_checkpoint(
    path: str,
    *,
    family: str,
    seed: int = 0,
    layers: int = 4,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 256,
    vocab: int = 512,
    max_positions: int = 512,
    dtype: str = "float32",
    max_shard_bytes: int = 1 << 30,
    draw_on: str = "cpu",
) -> ModelSpec:
    """Write a random model that `transformers` and this engine load, and return its spec.

    The same arguments give the same bytes. Billions of weights are drawn in seconds on a GPU
    (`draw_on="cuda"`), though they are not those that the CPU draws. The directory appears whole or not at all; raises
    `InvalidInput` if it exists or the geometry is impossible.
    """
    target = Path(path)
    if target.exists():
        raise InvalidInput(f"{path} exists already; choose another path or delete it")
    if vocab < len(_SPECIAL_TOKENS) + 256:
        raise InvalidInput(
            f"vocab must be at least {len(_SPECIAL_TOKENS) + 256} (bytes and special tokens), not {vocab}"
        )
    if hidden % heads or (family != "opt" and hidden // heads % 2):
        raise InvalidInput(
            f"hidden ({hidden}) must be a multiple of heads ({heads}), with an even quotient for rotations"
        )
    config = _config(family, layers, hidden, heads, kv_heads, ffn, vocab, max_positions, dtype)
    spec = ModelSpec.from_hf_config(config, name=target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_json(staging / "config.json", config)
        ids = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "pad_token_id": 0}
        _write_json(staging / "generation_config.json", ids)
        _write_tokenizer(staging, vocab, max_positions)
        _write_weights(staging, spec, seed, max_shard_bytes, draw_on)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return spec


def _config(
    family: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    ffn: int,
    vocab: int,
    max_positions: int,
    dtype: str,
) -> dict[str, Any]:
    if family not in get_args(Family):
        raise InvalidInput(f"family {family!r} is unknown; choose one of {', '.join(get_args(Family))}")
    shared = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_positions,
        "dtype": dtype,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "opt":
        return shared | {
            "ffn_dim": ffn,
            "word_embed_proj_dim": hidden,
            "do_layer_norm_before": True,
            "activation_function": "relu",
            "enable_bias": True,
        }
    return (
        shared
        | {
            "num_key_value_heads": kv_heads,
            "head_dim": hidden // heads,
            "intermediate_size": ffn,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
        }
        | ({"sliding_window": max(max_positions // 2, 1)} if family == "mistral" else {})
    )


def _write_weights(directory: Path, spec: ModelSpec, seed: int, max_shard_bytes: int, draw_on: str) -> None:
    shards = _shards(spec, max_shard_bytes)
    count = len(shards)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    with ThreadPoolExecutor(_WRITERS) as pool:
        paths = [directory / name for name in names]
        deque(pool.map(lambda path, shard: _write_shard(path, shard, spec, seed, draw_on), paths, shards), maxlen=0)
    if count > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for _, tensor in shard}
        index = {"metadata": {"total_size": spec.weight_bytes}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)


_Shard = list[tuple[int, TensorSpec]]
"""Tensors of one file with their numbers in the checkpoint."""


def _shards(spec: ModelSpec, max_shard_bytes: int) -> list[_Shard]:
    """Which tensors go to which file: in checkpoint order, as many as fit, but at least one."""
    shards: list[_Shard] = [[]]
    size = 0
    for number, tensor in enumerate(tensors(spec)):
        tensor_bytes = tensor.elements * spec.dtype_bytes
        if shards[-1] and size + tensor_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((number, tensor))
        size += tensor_bytes
    return shards


def _write_shard(path: Path, shard: _Shard, spec: ModelSpec, seed: int, draw_on: str) -> None:
    """Every tensor comes from its own stream of random numbers, so that none depends on the others."""
    dtype = _DTYPES[spec.dtype]
    values = {tensor.name: _random(tensor, seed, number, draw_on).to(dtype).cpu() for number, tensor in shard}
    save_file(values, path, metadata={"format": "pt"})


def _random(tensor: TensorSpec, seed: int, number: int, draw_on: str) -> Tensor:
    if draw_on == "cpu":
        values = np.random.Generator(np.random.Philox(key=[seed, number])).standard_normal(tensor.shape, np.float32)
        return torch.from_numpy(values * _std(tensor) + _mean(tensor))
    source = torch.Generator(draw_on).manual_seed((seed << 32) + number)
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device=draw_on)
    return drawn.normal_(float(_mean(tensor)), float(_std(tensor)), generator=source)


def _is_norm(tensor: TensorSpec) -> bool:
    return "norm" in tensor.name


def _mean(tensor: TensorSpec) -> np.float32:
    if not _is_norm(tensor) or tensor.name.endswith("bias"):
        return np.float32(0.0)
    return np.float32(_ATTENTION_GAIN if "q_norm" in tensor.name or "k_norm" in tensor.name else 1.0)


def _std(tensor: TensorSpec) -> np.float32:
    """Keeps activations near 1 from layer to layer, and logits at a spread of a few units."""
    fan_in = tensor.shape[-1]
    if _is_norm(tensor) or tensor.name.endswith("bias"):
        return np.float32(0.1)
    if "embed" in tensor.name:
        return np.float32(0.5)
    gain = _LOGIT_STD if tensor.name == "lm_head.weight" else 1.0
    if "q_proj" in tensor.name or "k_proj" in tensor.name:
        gain = _ATTENTION_GAIN
    return np.float32(gain / fan_in**0.5)


def _write_tokenizer(directory: Path, vocab: int, max_positions: int) -> None:
    """Byte-level BPE: specials, the 256 bytes, then pairs of letters until the vocabulary is full."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "etaoinshrdlcumwfgypbvkjxqz"
    pairs = [(first, second) for first in ("Ġ", *letters) for second in letters]
    merges = pairs[: vocab - len(_SPECIAL_TOKENS) - len(alphabet)]
    pieces = [*_SPECIAL_TOKENS, *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL_TOKENS))
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_positions,
            "pad_token": "<pad>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
