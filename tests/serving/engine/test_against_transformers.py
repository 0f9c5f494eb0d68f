"""Logits within 1e-4 of the reference implementation in float32, prefill and decode, in every layout."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec
from tests.serving.engine.replica import Replica

TOLERANCE = 1e-4
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "opt"]
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
TOKENS = [1, *((7 * i * i + 3 * i) % 300 for i in range(39))]


def reference(path: Path, tokens: list[int]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    root = tmp_path_factory.mktemp("checkpoints")
    result = {}
    for family in FAMILIES:
        path = root / family
        create_checkpoint(
            str(path),
            family=family,
            seed=3,
            layers=3,
            hidden=64,
            heads=4,
            kv_heads=2,
            ffn=100,
            vocab=300,
            max_positions=64,
        )
        result[family] = (path, reference(path, TOKENS))
    return result


def assert_like_reference(path: Path, expected: Tensor, stages: int, shards: int) -> None:
    replica = Replica(str(path), read_spec(str(path)), stages, shards)
    chunks = [20, 15, 1, 1, 1, 1, 1]
    ends = torch.tensor(chunks).cumsum(0) - 1
    for logits, end in zip(replica.logits(TOKENS, chunks), ends.tolist(), strict=True):
        assert (logits - expected[end]).abs().max() < TOLERANCE


@pytest.mark.parametrize(("stages", "shards"), LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_layout(
    family: str, stages: int, shards: int, checkpoints: dict[str, tuple[Path, Tensor]]
) -> None:
    path, expected = checkpoints[family]
    assert_like_reference(path, expected, stages, shards)


def test_sliding_window_is_narrower_than_the_test(checkpoints: dict[str, tuple[Path, Tensor]]) -> None:
    window = read_spec(str(checkpoints["mistral"][0])).sliding_window
    assert window is not None
    assert window < len(TOKENS)


def save_reference_model(path: Path, kind: str) -> None:
    """A checkpoint written by the reference library, with options `create_checkpoint` has not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        torch.manual_seed(5)
        shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "max_position_embeddings": 64}
        if kind == "opt":
            config = transformers.OPTConfig(hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, **shared)
            model = transformers.OPTForCausalLM(config)
        elif kind == "qwen3":
            config = transformers.Qwen3Config(
                hidden_size=64,
                intermediate_size=96,
                num_key_value_heads=2,
                head_dim=24,
                tie_word_embeddings=True,
                **shared,
            )
            model = transformers.Qwen3ForCausalLM(config)
        else:
            rope = {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
            config = transformers.LlamaConfig(
                hidden_size=64,
                intermediate_size=96,
                num_key_value_heads=1,
                rope_parameters=rope,
                attention_bias=True,
                mlp_bias=True,
                **shared,
            )
            model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(path)


@pytest.mark.parametrize("kind", ["llama3-rope-and-biases", "qwen3", "opt"])
def test_checkpoints_of_the_reference_library(kind: str, tmp_path: Path) -> None:
    save_reference_model(tmp_path / "model", kind)
    expected = reference(tmp_path / "model", TOKENS)
    for stages, shards in [(1, 1), (2, 2)]:
        assert_like_reference(tmp_path / "model", expected, stages, shards)


def test_bfloat16_and_sharded_files_load_like_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "model"
    create_checkpoint(
        str(path),
        family="llama",
        seed=1,
        layers=3,
        hidden=64,
        ffn=96,
        vocab=300,
        max_positions=64,
        dtype="bfloat16",
        max_shard_bytes=50_000,
    )
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert_like_reference(path, reference(path, TOKENS), 2, 2)
