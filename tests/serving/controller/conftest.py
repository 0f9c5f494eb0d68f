from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data.models import ModelSpec
from serving.engine.checkpoint import create_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    create_checkpoint(str(path), family="llama", layers=2, hidden=32, heads=2, kv_heads=2, ffn=64, vocab=300)
    return path


@pytest.fixture(scope="session")
def spec(checkpoint: Path) -> ModelSpec:
    from serving.engine.weights import read_spec

    return read_spec(str(checkpoint))


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
