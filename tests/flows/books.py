"""Small plan books and a profile, made by hand."""

from __future__ import annotations

from dataclasses import replace

from data.cluster import ClusterSpec, ClusterState, InstanceType
from data.demand import Demand
from data.deployment import Deployment, Hosted, SharedGroup
from data.explanation import Candidate, Estimate, Move
from data.fingerprint import Fingerprint
from data.layout import ParallelConfig
from data.models import ModelSpec
from data.plan import Objective, Plan, PlanBook
from data.profile import Profile
from data.shared_plan import Forecast, SharedPlan, SharedPlanBook

MODEL = ModelSpec(
    name="Tiny/Llama",
    family="llama",
    layers=4,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=128,
    vocab=256,
    max_positions=256,
)
LOCAL = InstanceType(
    name="local-cpu",
    devices=1,
    accelerator="cpu",
    memory_bytes=1 << 30,
    network_bytes_per_s=1e9,
    local_bytes_per_s=4e9,
    price_on_demand_usd_h=0.04,
    price_spot_usd_h=0.01,
)


def plan(instances: int, max_batch: int) -> Plan:
    """A plan that uses every instance as a pipeline stage."""
    state = ClusterState.of({"local-cpu": instances})
    config = ParallelConfig(replicas=1, stages=instances, shards=1, max_batch=max_batch)
    estimate = Estimate(latency_s=1.0 / instances, throughput_rps=float(instances), memory_bytes=10**8 // instances)
    return Plan(state, config, estimate, "lowest latency | of all", (Candidate(config, estimate),), "one stage less")


def book(max_batch: int = 4, instances: int = 3) -> PlanBook:
    """Plans for every state of a fleet of `instances` one-device machines; the empty fleet cannot serve."""
    empty = Plan(ClusterState.of({}), None, None, "no devices")
    plans = (empty, *(plan(count, max_batch) for count in range(1, instances + 1)))
    cluster = ClusterSpec("local-4", (LOCAL,), (instances,))
    return PlanBook(MODEL, cluster, Objective(1.0, 32, 16), "latency", profile().sha256, plans)


def journey() -> PlanBook:
    """A book in which two stages stay on three instances once they run."""
    one, two, three = (plan(count, 4) for count in (1, 2, 3))
    assert two.config is not None
    assert three.config is not None
    frontier = (*three.frontier, *two.frontier)
    staying = replace(three, frontier=frontier, transitions=((two.config, two.config),))
    moves = (Move(two.config, three.config, 3 * 10**9, 4.0, 0.5), Move(three.config, two.config, 10**9, 2.0, 0.25))
    return replace(book(), policy="journey", plans=(one, two, staying), moves=moves, assumptions="nothing is lost")


def shared(max_batch: int = 4) -> SharedPlanBook:
    """Two models on one and on two machines."""
    models = tuple(replace(MODEL, name=name) for name in ("chat", "code"))
    group = SharedGroup(1, 1, tuple(Hosted(spec.name, max_batch, 0.5) for spec in models))
    forecast = Forecast(0.9, 0.95, (0.85, 1.0))
    plans = (
        SharedPlan(ClusterState.of({}), None, "there is no instance"),
        SharedPlan(ClusterState.of({"local-cpu": 1}), Deployment((group,)), "the best that was found", forecast),
        SharedPlan(ClusterState.of({"local-cpu": 2}), Deployment((group, group)), "as before", forecast),
    )
    demands = tuple(Demand(spec.name, 2.0, 1.5, 1.0, 32, 16) for spec in models)
    cluster = ClusterSpec("local-2", (LOCAL,), (2,))
    return SharedPlanBook(models, cluster, "placement", plans, demands=demands, occasion="more is asked of chat")


def profile() -> Profile:
    """Two step times and one link time."""
    fingerprint = Fingerprint.of(
        device="cpu", devices=1, cpu="test", cores=2, memory_bytes=1 << 30, os="linux", python="3.11", torch="2"
    )
    shared = {"layers": 2, "shards": 1, "spread_ms": 0.1, "repeats": 3, "part": "layers"}
    steps = [
        {**shared, "phase": "prefill", "batch": 1, "tokens": 32, "context": 0, "time_ms": 3.0},
        {**shared, "phase": "decode", "batch": 2, "tokens": 1, "context": 32, "time_ms": 1.0},
    ]
    links = [{"kind": "network", "bytes": 1 << 20, "time_ms": 1.0, "repeats": 3}]
    return Profile.of(MODEL, fingerprint, steps, links)


def grid() -> Profile:
    """Enough step times to fit a cost model and to hold some out: linear in layers, tokens and sequences."""
    steps = [
        {
            "phase": phase,
            "part": "layers",
            "layers": layers,
            "shards": 1,
            "batch": batch,
            "tokens": tokens,
            "context": 32,
            "time_ms": layers * (1.0 + 0.1 * batch * tokens),
            "spread_ms": 0.1,
            "repeats": 3,
        }
        for phase, sizes in (("prefill", ((1, 16), (1, 32), (1, 64))), ("decode", ((1, 1), (4, 1), (8, 1))))
        for layers in (1, 2, 4)
        for batch, tokens in sizes
    ]
    return Profile.of(MODEL, profile().fingerprint, steps, profile().links.to_pylist())
