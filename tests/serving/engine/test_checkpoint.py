import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data.errors import InvalidInput
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec


def small(path: Path, **changes: object) -> None:
    create_checkpoint(str(path), **{"family": "llama", "layers": 1, "hidden": 32, "ffn": 48, "vocab": 300} | changes)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_same_arguments_same_bytes_other_seed_other_weights(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        small(tmp_path / name, seed=seed)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert files(tmp_path / "one") != files(tmp_path / "three")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "three"}, "no staging directory stays"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "opt"])
def test_the_returned_spec_is_the_stored_one(tmp_path: Path, family: str) -> None:
    spec = create_checkpoint(str(tmp_path / "model"), family=family, layers=1, hidden=32, ffn=48, vocab=300)
    assert spec == read_spec(str(tmp_path / "model"))
    assert spec.eos_token_ids == (2,)


@pytest.mark.parametrize("vocab", [259, 300, 2000])
def test_any_text_survives_the_tokenizer(tmp_path: Path, vocab: int) -> None:
    small(tmp_path / "model", vocab=vocab)
    text = "the streams never break — ¿sí? 日本 \x00\n"
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert max(ids) < vocab
    assert tokenizer.decode(ids) == text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        assert AutoTokenizer.from_pretrained(tmp_path / "model")(text)["input_ids"] == ids


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab": 100}, "vocab must be"),
        ({"hidden": 30}, "multiple of heads"),
        ({"family": "gpt"}, "unknown"),
        ({"kv_heads": 3}, "KV heads"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_impossible_models_are_refused_and_leave_nothing(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        small(tmp_path / "model", **changes)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_path_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="exists already"):
        small(tmp_path)
