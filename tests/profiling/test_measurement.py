from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pyarrow.compute as pc
import pytest

from data.errors import InvalidInput, PerennialError
from data.models import ModelSpec
from data.profile import Profile
from planning.costs import holdout_error
from profiling.fingerprint import take_fingerprint
from profiling.grid import Grid
from profiling.measurement import measure
from serving.engine.checkpoint import create_checkpoint
from serving.settings import EngineSettings

TINY = ModelSpec(
    name="tiny",
    family="llama",
    layers=2,
    hidden=32,
    heads=2,
    kv_heads=1,
    head_dim=16,
    ffn=64,
    vocab=300,
    max_positions=64,
)
GRID = Grid(
    shards=(1, 2),
    layers=(1, 2),
    prefill_batches=(1,),
    prompts=(4, 32),
    chunk_context=31,
    batches=(1, 4),
    contexts=(8, 48),
    message_bytes=(1 << 10, 1 << 23),
)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    path = str(tmp_path_factory.mktemp("checkpoints") / "tiny")
    create_checkpoint(path, family="llama", layers=2, hidden=32, heads=2, kv_heads=1, ffn=64, vocab=300)
    return measure(path, grid=GRID, budget_s=2.0)


def _times(profile: Profile, **wanted: object) -> list[float]:
    rows = profile.steps.to_pylist()
    return [row["time_ms"] for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_every_part_is_measured_for_every_degree(profile: Profile) -> None:
    seen = {(row["phase"], row["part"], row["shards"]) for row in profile.steps.to_pylist()}
    parts = ("layers", "embed", "head", "step")
    assert seen == {(phase, part, t) for phase in ("prefill", "decode") for part in parts for t in (1, 2)}
    assert all(row["time_ms"] > 0 and row["repeats"] >= 3 for row in profile.steps.to_pylist())
    assert {row["layers"] for row in profile.steps.to_pylist() if row["part"] == "layers"} == {1, 2}


def test_more_work_takes_longer(profile: Profile) -> None:
    shape = {"part": "layers", "shards": 1}
    assert sum(_times(profile, layers=2, **shape)) > 1.2 * sum(_times(profile, layers=1, **shape))
    shape |= {"phase": "prefill", "context": 0}
    assert sum(_times(profile, tokens=32, **shape)) > sum(_times(profile, tokens=4, **shape))


def test_links_between_workers_and_from_disk_are_measured(profile: Profile) -> None:
    times = {(row["kind"], row["bytes"]): row["time_ms"] for row in profile.links.to_pylist()}
    assert {kind for kind, _ in times} == {"local", "network", "disk"}
    assert all(time > 0 for time in times.values())
    small, large = (min(times[kind, size] for kind in ("local", "network")) for size in GRID.message_bytes)
    assert large > small


def test_the_cost_model_predicts_points_that_it_has_not_seen(profile: Profile) -> None:
    alone = replace(profile, steps=profile.steps.filter(pc.equal(profile.steps["shards"], 1)))
    median, p90 = holdout_error(alone)
    assert 0 < median <= p90
    assert median < 0.5


def test_a_profile_knows_its_machine_and_survives_a_file(profile: Profile, tmp_path: Path) -> None:
    same = take_fingerprint(device="cpu", dtype="float32", numerics="auto", threads=1)
    assert profile.fingerprint == same
    assert same != take_fingerprint(device="cpu", dtype="float32", numerics="native", threads=1)
    profile.write(tmp_path / "profile")
    assert Profile.read(tmp_path / "profile").sha256 == profile.sha256


def test_a_spent_budget_leaves_the_corners() -> None:
    grid = msgspec.structs.replace(GRID, batches=(1, 2, 4), contexts=(8, 48))
    result = measure(TINY, grid=grid, budget_s=0.0)
    decode = [row for row in result.steps.to_pylist() if row["part"] == "layers" and row["phase"] == "decode"]
    assert len(decode) == 4 * len(grid.shards) * len(grid.layers)
    assert {(1, 8), (4, 48)} <= {(row["batch"], row["context"]) for row in decode}
    assert {row["kind"] for row in result.links.to_pylist()} == {"local", "network"}


def test_a_process_that_fails_is_explained_and_none_stays() -> None:
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(PerennialError, match="exact numerics work in float32"):
        measure(TINY, grid=GRID, engine=EngineSettings(dtype="bfloat16", numerics="exact"))
    with pytest.raises(PerennialError, match=r"measuring process \d died"):
        measure(TINY, grid=GRID, engine=EngineSettings(dtype="float8"))
    assert set(psutil.Process().children(recursive=True)) <= before


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(InvalidInput, match="choose cpu or cuda"):
        measure(TINY, engine=EngineSettings(device="tpu"))
    with pytest.raises(InvalidInput, match="at least one shard"):
        Grid.of(TINY, max_shards=-1, cuda=False)


def test_the_default_grid_fits_the_model() -> None:
    grid = Grid.of(TINY, max_shards=8, cuda=False)
    assert grid.shards == (1, 2)
    points = [point for layers in grid.layers for point in grid.points(2, layers)]
    assert len(set(points)) == len(points)
    assert all(point.context + point.tokens <= TINY.max_positions for point in points)
    assert all(point.batch * (point.context + point.tokens) <= grid.most_tokens for point in points)
