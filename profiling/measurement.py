"""Measuring a profile from start to end. Needs neither Prefect nor MLflow, so it runs where the devices are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from data.errors import InvalidInput
from data.models import ModelSpec
from data.profile import Profile
from profiling.campaign import Campaign, LinkTime, Progress, StepTime
from profiling.fingerprint import device_count, take_fingerprint
from profiling.grid import Grid
from profiling.processes import follow
from serving.engine.weights import read_spec
from serving.settings import EngineSettings

_SLACK_S = 120.0  # beyond the budget: starting processes, forming groups, making weights, essential points


def measure(
    source: ModelSpec | str,
    *,
    engine: EngineSettings | None = None,
    grid: Grid | None = None,
    max_shards: int = 0,
    budget_s: float = 15.0,
    on_progress: Callable[[Progress], None] | None = None,
) -> Profile:
    """Measure step and link times of a model on this machine's devices.

    `source` is a checkpoint folder, or the model's geometry alone (then the disk is not measured).
    One process per shard, up to `max_shards` (0: as many as there are devices, 4 on a CPU);
    `budget_s` bounds the time spent on steps, beyond it only corners are measured. Raises
    `InvalidInput` for impossible requests, `PerennialError` if a process fails.
    """
    engine = engine or EngineSettings()
    spec = read_spec(source) if isinstance(source, str) else source
    grid = grid or default_grid(spec, engine.device, max_shards)
    fingerprint = take_fingerprint(
        device=engine.device, dtype=engine.dtype, numerics=engine.numerics, threads=engine.threads
    )
    campaign = _campaign(spec, source if isinstance(source, str) else "", engine, grid, budget_s)
    steps: list[dict[str, Any]] = []
    links: list[dict[str, Any]] = []
    for answer in follow(campaign, timeout_s=campaign.timeout_s):
        if isinstance(answer, StepTime):
            steps.append(msgspec.structs.asdict(answer))
        elif isinstance(answer, LinkTime):
            links.append(msgspec.structs.asdict(answer))
        elif isinstance(answer, Progress) and on_progress is not None:
            on_progress(answer)
    return Profile.of(spec, fingerprint, steps, links)


def default_grid(spec: ModelSpec, device: str, max_shards: int = 0) -> Grid:
    """The grid that `measure` uses for a model on this machine. Raises `InvalidInput` for too many shards."""
    available = device_count(device) if device == "cuda" else 4
    if max_shards > available and device == "cuda":
        raise InvalidInput(f"{max_shards} shards need as many devices; this machine has {available}")
    return Grid.of(spec, max_shards=max_shards or available, cuda=device == "cuda")


def _campaign(spec: ModelSpec, checkpoint: str, engine: EngineSettings, grid: Grid, budget_s: float) -> Campaign:
    return Campaign(
        model=spec.to_json(),
        checkpoint=checkpoint,
        device=engine.device,
        dtype=engine.dtype,
        numerics=engine.numerics,
        threads=engine.threads,
        block_tokens=engine.block_tokens,
        grid=grid,
        # Links are measured between two workers, also where nothing is sharded.
        world=max(*grid.shards, min(2, device_count(engine.device) if engine.device == "cuda" else 2)),
        store="",
        host="127.0.0.1",
        budget_s=budget_s,
        timeout_s=budget_s + _SLACK_S,
    )
