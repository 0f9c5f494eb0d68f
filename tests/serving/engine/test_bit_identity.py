"""Logits and tokens are the same bits in any layout, batch, chunking and after a replay.

The last test runs the same comparison with ordinary float32 kernels and expects it to fail: it
shows that these tests would notice an inexact sum.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from data.models import ModelSpec
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec
from tests.serving.engine.cells import extract, insert
from tests.serving.engine.replica import Replica, Stream, serve

PROMPTS = [[1, *((k * i * i + 5 * i + k) % 300 for i in range(length))] for k, length in enumerate([3, 17, 30, 8, 1])]
LAYOUTS = [
    (1, 2, ()),
    (1, 3, ()),
    (1, 4, ()),
    (1, 5, ()),
    (1, 8, ()),
    (2, 1, (1, 2)),
    (2, 3, (2, 1)),
    (3, 2, ()),
]


@pytest.fixture(scope="module", params=["llama", "qwen3", pytest.param("mistral", marks=pytest.mark.slow), "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ModelSpec]:
    return make_model(request.param, tmp_path_factory.mktemp("model"))


def make_model(family: str, directory: Path) -> tuple[str, ModelSpec]:
    path = str(directory / family)
    create_checkpoint(
        path, family=family, seed=7, layers=3, hidden=64, heads=8, kv_heads=2, ffn=92, vocab=301, max_positions=64
    )
    return path, read_spec(path)


@cache
def undisturbed(path: str, numerics: str = "exact") -> list[Stream]:
    return serve(Replica(path, read_spec(path), numerics=numerics), PROMPTS)


def same_bits(first: list[Stream], second: list[Stream]) -> bool:
    """Same tokens, and the same logits for every token that the second run drew."""
    return all(
        one.tokens == other.tokens
        and all(torch.equal(*pair) for pair in zip(one.logits[-len(other.logits) :], other.logits, strict=True))
        for one, other in zip(first, second, strict=True)
    )


@pytest.mark.parametrize(("stages", "shards", "partition"), LAYOUTS)
def test_layouts(model: tuple[str, ModelSpec], stages: int, shards: int, partition: tuple[int, ...]) -> None:
    replica = Replica(*model, stages, shards, partition)
    assert same_bits(undisturbed(model[0]), serve(replica, PROMPTS))


@pytest.mark.parametrize("step_tokens", [1, 3, 7, 64])
def test_chunk_sizes(model: tuple[str, ModelSpec], step_tokens: int) -> None:
    assert same_bits(undisturbed(model[0]), serve(Replica(*model), PROMPTS, step_tokens=step_tokens))


def test_batch_compositions(model: tuple[str, ModelSpec]) -> None:
    replica = Replica(*model)
    alone = [serve(replica, [prompt])[0] for prompt in PROMPTS]
    assert same_bits(undisturbed(model[0]), alone)
    assert same_bits(undisturbed(model[0]), serve(replica, PROMPTS[::-1], max_batch=2)[::-1])


def test_preemption_for_want_of_blocks(model: tuple[str, ModelSpec]) -> None:
    assert same_bits(undisturbed(model[0]), serve(Replica(*model), PROMPTS, blocks=13))


def test_replay_elsewhere_equals_decoding_here(model: tuple[str, ModelSpec]) -> None:
    whole = undisturbed(model[0])
    for shards in (1, 3):
        replayed = serve(Replica(*model, 1, shards), PROMPTS, committed=[stream.tokens[:5] for stream in whole])
        assert same_bits(whole, replayed)


def test_moved_kv_equals_kv_computed_here(model: tuple[str, ModelSpec]) -> None:
    """KV boxes of a (1, 3) layout assembled into a (2, 2) layout are the bits that it computes itself."""
    source, target, check = Replica(*model, 1, 3), Replica(*model, 2, 2), Replica(*model, 2, 2)
    tokens, blocks = PROMPTS[2], list(range(95, 86, -1))
    source.logits(tokens, [len(tokens)])
    check.logits(tokens, [len(tokens)])
    for stage in range(2):
        for own, expected in zip(target.caches[stage], check.caches[stage], strict=True):
            for held in source.caches[0]:
                heads = max(own.heads[0], held.heads[0]), min(own.heads[1], held.heads[1])
                if heads[0] < heads[1]:
                    box = extract(held, blocks, len(tokens), own.layers, heads)
                    insert(own, blocks, len(tokens), own.layers, heads, box)
            whole = (blocks, len(tokens), own.layers, own.heads)
            assert torch.equal(extract(own, *whole), extract(expected, *whole))


def test_sampled_streams(model: tuple[str, ModelSpec]) -> None:
    here = serve(Replica(*model), PROMPTS, temperature=1.0)
    assert same_bits(here, serve(Replica(*model, 2, 3), PROMPTS, temperature=1.0, step_tokens=5))


def test_continuations_depend_on_the_prompt(model: tuple[str, ModelSpec]) -> None:
    streams = undisturbed(model[0])
    assert len({tuple(stream.tokens) for stream in streams}) == len(PROMPTS)
    assert all(len(set(stream.tokens)) > 4 for stream in streams)


def test_inexact_sums_would_be_noticed(tmp_path: Path) -> None:
    path, spec = make_model("llama", tmp_path)
    whole = undisturbed(path, "native")
    noticed = [
        not same_bits(whole, serve(Replica(path, spec, 1, 2, numerics="native"), PROMPTS)),
        not same_bits(whole, serve(Replica(path, spec, 1, 3, numerics="native"), PROMPTS)),
        not same_bits(whole, serve(Replica(path, spec, numerics="native"), PROMPTS, step_tokens=3)),
    ]
    assert all(noticed)
