"""Models of known costs, for tests of books of several models."""

from __future__ import annotations

import numpy as np

from data.cluster import ClusterSpec, InstanceType
from data.demand import Demand
from data.models import ModelSpec
from planning.costs import CostModel, LinkCost
from planning.hosting import Tenant
from planning.regression import Curve

MIB = 1 << 20


def spec(name: str, layers: int = 8) -> ModelSpec:
    return ModelSpec(
        name=name,
        family="llama",
        layers=layers,
        hidden=256,
        heads=8,
        kv_heads=4,
        head_dim=32,
        ffn=512,
        vocab=1000,
        max_positions=512,
    )


def costs(name: str = "a", *, layer_ms: float = 1.0, head_ms: float = 0.0, layers: int = 8) -> CostModel:
    """A decode step takes `layer_ms` for every layer and a tenth more for every sequence; shards halve it."""
    curves = {}
    for shards, scale in ((1, 1.0), (2, 0.5)):
        for phase in ("prefill", "decode"):
            layer = np.array([0.0, layer_ms, 0.1 * layer_ms, 0.01 * layer_ms, 0.0]) * scale
            curves[phase, "layers", shards] = Curve(layer)
            curves[phase, "head", shards] = Curve(np.array([head_ms, 0.0, 0.0]))
    return CostModel(spec(name, layers), curves, {"network": LinkCost(0.0, 0.0)}, 4)


def tenant(
    name: str = "a", *, slo_s: float = 2.0, rate_rps: float = 2.0, cv: float = 1.0, layer_ms: float = 1.0
) -> Tenant:  # fmt: skip
    return Tenant(Demand(name, slo_s, rate_rps, cv, 32, 32), costs(name, layer_ms=layer_ms))


def cluster(instances: int = 3, *, memory_mib: int = 256, devices: int = 1) -> ClusterSpec:
    kind = InstanceType("box", devices, "cpu", memory_mib * MIB, 1e9, 1e9, 1.0, 0.5)
    return ClusterSpec(f"box-{instances}", (kind,), (instances,))
