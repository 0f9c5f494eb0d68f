"""Small shared fleets for tests of placement and of the simulations."""

from __future__ import annotations

import numpy as np

from data.placement import Arrivals, HostedModel, Shape, SharedFleet, StageProfile

GIB = 2.0**30


def profile(seconds: float, gib: float, shards: int, stages: int) -> StageProfile:
    """A model of `seconds` and `gib` on one device, split evenly; shards cost a fifth more each time they double."""
    each_s = seconds / shards * 1.2 ** (shards.bit_length() - 1) / stages
    weights = tuple(gib * GIB / shards / stages for _ in range(stages))
    return StageProfile((each_s,) * stages, weights)


def profiles(seconds: float, gib: float, largest: int = 8) -> dict[Shape, StageProfile]:
    degrees = [1, 2, 4, 8]
    shapes = [Shape(shards, stages) for shards in degrees for stages in degrees if shards * stages <= largest]
    return {shape: profile(seconds, gib, shape.shards, shape.stages) for shape in shapes}


def fleet(
    kinds: list[str], *, devices: int = 4, budget_gib: float = 13.0, slo_scale: float = 3.0, rate_rps: float = 1.0
) -> SharedFleet:
    """Models of the kinds small (0.1 s, 3 GiB), large (0.3 s, 12 GiB)."""
    single = {"small": (0.1, 3.0), "large": (0.3, 12.0)}
    models = tuple(
        HostedModel(f"{kind}-{n}", kind, slo_scale * single[kind][0], rate_rps, 2.0) for n, kind in enumerate(kinds)
    )
    return SharedFleet(devices, budget_gib * GIB, 8, models, {kind: profiles(*single[kind]) for kind in single})


def arrivals(models: int, *, seed: int = 0, duration_s: float = 100.0, rate_rps: float = 1.0) -> Arrivals:
    """Bursty arrivals of every model."""
    generator = np.random.default_rng(seed)
    times, ids = [], []
    for model in range(models):
        gaps = generator.gamma(0.25, 4.0 / rate_rps, int(duration_s * rate_rps * 2) + 10)
        stream = np.cumsum(gaps)
        stream = stream[stream < duration_s]
        times.append(stream)
        ids.append(np.full(len(stream), model))
    merged = np.argsort(np.concatenate(times), kind="stable")
    return Arrivals.of(np.concatenate(times)[merged], np.concatenate(ids)[merged])
