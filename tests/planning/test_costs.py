"""The cost model finds the times behind a noisy profile and predicts points it has not seen."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InvalidInput
from data.fingerprint import Fingerprint
from data.layout import ParallelConfig
from data.models import ModelSpec
from data.profile import Profile
from planning.costs import CostModel, holdout_error
from planning.queueing import erlang_c, waiting_s
from planning.resharding import kv_extent, weight_boxes

SPEC = ModelSpec("tiny", "llama", 8, 64, 8, 4, 8, 176, 300, 512)
MACHINE = Fingerprint.of(device="cpu", devices=2, cpu="c", cores=2, memory_bytes=1, os="o", python="p", torch="t")


def true_ms(part: str, layers: int, shards: int, batch: int, tokens: int, context: int) -> float:
    rows = batch * tokens
    if part != "layers":
        return 0.05 + 0.01 * rows / shards
    pairs = rows * (context + tokens / 2)
    return 0.1 + layers * (0.2 + 0.3 / shards + 0.02 * rows / shards + 2e-5 * pairs / shards)


def profile(noise: float = 0.0, outliers: int = 0, bend: float = 0.0) -> Profile:
    random = np.random.default_rng(7)
    rows: list[dict[str, Any]] = []
    for shards in (1, 2, 4):
        for part, layer_counts in (("layers", (1, 4)), ("embed", (0,)), ("head", (0,)), ("step", (0,))):
            for layers in layer_counts:
                points = [("prefill", b, t, c) for b in (1, 2) for t in (8, 32, 128) for c in (0, 100)]
                points += [("decode", b, 1, c) for b in (1, 2, 4, 8) for c in (16, 96, 256)]
                for phase, batch, tokens, context in points:
                    time_ms = true_ms(part, layers, shards, batch, tokens, context)
                    time_ms *= float(np.exp(random.normal(0, noise))) * (1 + bend * (batch * tokens) ** 0.5)
                    rows.append({
                        "phase": phase, "part": part, "layers": layers, "shards": shards, "batch": batch,
                        "tokens": tokens, "context": context, "time_ms": time_ms, "spread_ms": 0.1, "repeats": 5,
                    })  # fmt: skip
    for index in random.choice(len(rows), size=outliers, replace=False):
        rows[index]["time_ms"] *= 5
    links = [
        {"kind": kind, "bytes": size, "time_ms": 0.2 + size / rate, "repeats": 3}
        for kind, rate in (("local", 4e6), ("network", 1e6))
        for size in (1 << 10, 1 << 17, 1 << 23)
    ]
    return Profile.of(SPEC, MACHINE, rows, links)


@given(st.integers(1, 8), st.sampled_from([1, 2, 4]), st.integers(1, 12), st.integers(0, 400))
def test_exact_profiles_give_exact_predictions(layers: int, shards: int, batch: int, context: int) -> None:
    predicted = MODEL.step_ms("decode", layers, shards, batch, 1, context)
    assert predicted == pytest.approx(true_ms("layers", layers, shards, batch, 1, context), rel=0.03)


MODEL = CostModel.fit(profile())


def test_unmeasured_shards_lie_between_measured_ones() -> None:
    two, three, four = (MODEL.step_ms("prefill", 4, shards, 1, 64, 0) for shards in (2, 3, 4))
    assert four < three < two
    with pytest.raises(InvalidInput, match="profile more shards"):
        MODEL.step_ms("prefill", 4, 8, 1, 64, 0)


def test_noise_and_outliers_do_little() -> None:
    model = CostModel.fit(profile(noise=0.05, outliers=15))
    for layers, shards, batch, context in ((4, 1, 4, 96), (2, 2, 8, 200), (8, 4, 1, 50)):
        predicted = model.step_ms("decode", layers, shards, batch, 1, context)
        assert predicted == pytest.approx(true_ms("layers", layers, shards, batch, 1, context), rel=0.2)


def test_error_is_of_points_held_out() -> None:
    assert max(holdout_error(profile(), 1)) < 0.03
    median, p90 = holdout_error(profile(noise=0.1), 1)
    assert 0.03 < median < 0.15
    assert median < p90 < 0.4
    assert holdout_error(profile(noise=0.1), 1) == (median, p90)


def test_correction_follows_what_the_features_cannot() -> None:
    assert holdout_error(profile(bend=0.3), 1)[0] < 0.08


def test_links() -> None:
    assert MODEL.transfer_s(1 << 20, "network") == pytest.approx(2e-4 + (1 << 20) / 1e9, rel=0.01)
    assert MODEL.transfer_s(1 << 20, "local") < MODEL.transfer_s(1 << 20, "network")
    assert MODEL.transfer_s(1 << 20, "disk") == MODEL.transfer_s(1 << 20, "network")
    with pytest.raises(InvalidInput, match="link"):
        replace(MODEL, links={}).transfer_s(1, "disk")


def test_a_batch_shares_the_pipeline() -> None:
    config = ParallelConfig(1, 2, 1, 8)
    alone, shared = (MODEL.request_latency_s(config, batch, 64, 32) for batch in (1, 8))
    assert alone < shared < 8 * alone
    assert MODEL.throughput(config, 8, 64, 32) == pytest.approx(8 / shared)
    assert MODEL.throughput(replace(config, replicas=3), 8, 64, 32) == pytest.approx(24 / shared)


def test_memory_is_that_of_the_fullest_position() -> None:
    config = ParallelConfig(2, 3, 2, 4)
    model = replace(MODEL, reserve_bytes=1000)
    needs = []
    for position in config.positions():
        weights = 4 * sum(box.elements for box in weight_boxes(SPEC, config, position))
        needs.append(weights + 2 * 8 * 4 * kv_extent(SPEC, config, position).cells * 100 * 4)
    assert max(needs) + 1000 < model.memory_bytes(config, 100) < max(needs) + 1000 + 4 * 256 * 20 * 64
    assert model.memory_bytes(replace(config, max_batch=8), 100) > model.memory_bytes(config, 100)
    fullest = max(need for need in needs)
    whole = model.memory_bytes(config, 100, whole=True)
    assert SPEC.weight_bytes < whole < SPEC.weight_bytes + fullest + 1000 + 4 * 256 * 20 * 64


def test_a_profile_without_layers_is_refused() -> None:
    with pytest.raises(InvalidInput, match="measure it again"):
        CostModel.fit(Profile.of(SPEC, MACHINE, [], []))


@given(st.integers(1, 40), st.floats(0.01, 0.99))
def test_erlang_c_is_its_definition(servers: int, utilisation: float) -> None:
    load = servers * utilisation
    terms = [1.0]
    for count in range(1, servers + 1):
        terms.append(terms[-1] * load / count)
    busy = terms[-1] / (1 - utilisation)
    assert erlang_c(servers, load) == pytest.approx(busy / (sum(terms[:-1]) + busy))


def test_waiting_times() -> None:
    assert waiting_s(0.5, 1.0, 1) == pytest.approx(1.0)  # M/M/1: ρ/(μ−λ)
    assert waiting_s(0.5, 1.0, 1, service_cv=0) == pytest.approx(0.5)  # M/D/1
    assert waiting_s(0.5, 1.0, 1, arrival_cv=3.0) == pytest.approx(5.0)
    assert waiting_s(1.0, 1.0, 1) == inf
    assert waiting_s(0.0, 1.0, 1) == 0.0
    assert waiting_s(3.0, 1.0, 4) < waiting_s(0.75, 1.0, 1)
