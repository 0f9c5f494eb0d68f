"""Plan books: what is chosen, under which memory, and how a plan explains itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data.cluster import ClusterSpec, ClusterState, InstanceType
from data.errors import InvalidInput
from data.explanation import Candidate
from data.layout import ParallelConfig
from data.models import ModelSpec
from data.plan import Objective, PlanBook
from planning.book import Policy, build_book
from planning.configs import Choice, Limits, Momentary, choose
from planning.costs import CostModel, LinkCost
from planning.regression import Curve

SPEC = ModelSpec("tiny", "llama", 6, 64, 8, 4, 8, 176, 300, 512)
REFERENCE = Objective(2.0, 64, 64)


def costs(shard_gain: float = 0.7) -> CostModel:
    """A layer costs 0.4 ms on one shard, and `shard_gain` of that on twice as many."""
    curves = {
        (phase, "layers", shards): Curve(np.array([0.1, 0.4, 0.01, 0.01, 1e-6]) * shard_gain ** np.log2(shards))
        for phase in ("prefill", "decode")
        for shards in (1, 2, 4)
    }
    return CostModel(SPEC, curves, {"network": LinkCost(1e-4, 1e-9)}, kv_element_bytes=4)


def best(devices: int, memory: int = 1 << 40, objective: Objective = REFERENCE, **limits: object) -> Choice:
    return choose(costs(), devices, objective, Limits(memory, **limits), "perennial")  # type: ignore[arg-type]


def test_what_does_not_fit_is_explained() -> None:
    choice = best(2, memory=100_000)
    assert choice.config is None
    assert "does not fit on 2 devices" in choice.reason
    assert "no allowed configuration" in best(2, allowed=[(3, 1)]).reason


def test_memory_spreads_the_model() -> None:
    whole = costs().memory_bytes(ParallelConfig(1, 1, 1, 1), 128)
    for memory in (whole, whole * 2 // 3, whole // 2):
        choice = best(6, memory=memory)
        assert choice.config is not None
        assert choice.estimate is not None
        assert choice.estimate.memory_bytes <= memory
        assert memory >= whole or choice.config.replica_devices > 1


def test_any_number_of_stages_and_shards_can_win() -> None:
    uneven = best(4, allowed=[(4, 1)])
    assert uneven.config is not None
    assert uneven.config.stages == 4
    odd = best(3, allowed=[(1, 3)])
    assert odd.config is not None
    assert odd.config.shards == 3


def test_stages_are_uneven_where_that_is_quicker_and_fits() -> None:
    head = {("decode", "head", 1): Curve(np.array([1.5, 0.0, 0.0])), ("prefill", "head", 1): Curve(np.zeros(3))}
    heavy = replace(costs(), curves={**costs().curves, **head})
    objective = replace(REFERENCE, required_rps=1e6)  # full batches, so that the slowest stage decides

    def chosen(memory_bytes: int, policy: Momentary = "perennial") -> Candidate:
        choice = choose(heavy, 2, objective, Limits(memory_bytes, allowed=[(2, 1)]), policy)
        return next(one for one in choice.frontier if one.config == choice.config)

    uneven, published = chosen(1 << 40), chosen(1 << 40, "spotserve")
    assert uneven.config.partition == (5, 1)
    assert published.config.partition == ()
    assert uneven.estimate.latency_s == heavy.request_latency_s(uneven.config, 8, 64, 64)
    assert uneven.estimate.latency_s < heavy.request_latency_s(published.config, 8, 64, 64)
    balanced = chosen(heavy.memory_bytes(replace(uneven.config, partition=()), 128))
    assert balanced.config == replace(uneven.config, partition=())


def test_the_required_rate_decides_between_latency_and_throughput() -> None:
    relaxed = best(4, objective=replace(REFERENCE, required_rps=0.1))
    pressed = best(4, objective=replace(REFERENCE, required_rps=1e6))
    assert relaxed.estimate is not None
    assert pressed.estimate is not None
    assert "smallest latency" in relaxed.reason
    assert "none sustains" in pressed.reason
    assert relaxed.estimate.latency_s < pressed.estimate.latency_s
    assert relaxed.estimate.throughput_rps < pressed.estimate.throughput_rps
    every = max(one.estimate.throughput_rps for one in pressed.frontier)
    assert pressed.estimate.throughput_rps == every


def test_no_other_configuration_of_the_frontier_beats_the_choice() -> None:
    choice = best(8)
    assert choice.estimate is not None
    sustaining = [one for one in choice.frontier if one.estimate.throughput_rps > REFERENCE.required_rps]
    assert choice.estimate.latency_s == min(one.estimate.latency_s for one in sustaining)
    by_name = {str(one.config): one for one in choice.frontier}
    for one in choice.frontier:
        if one.dominated_by:
            better = by_name[one.dominated_by].estimate
            assert better.latency_s <= one.estimate.latency_s
            assert better.throughput_rps >= one.estimate.throughput_rps


def test_an_slo_is_kept_on_the_fewest_devices() -> None:
    fastest = best(8)
    assert fastest.config is not None
    assert fastest.estimate is not None
    kept = best(8, objective=replace(REFERENCE, slo_s=fastest.estimate.latency_s * 3))
    assert kept.config is not None
    assert kept.config.devices < fastest.config.devices
    missed = best(8, objective=replace(REFERENCE, slo_s=1e-6))
    assert missed.config == fastest.config


def test_residency_is_what_there_is_memory_for() -> None:
    config = ParallelConfig(1, 2, 1, 1)
    part, whole = (costs().memory_bytes(config, 128, whole=whole) for whole in (False, True))
    assert part < whole
    for memory, residency in ((part, "shard"), (whole - 1, "shard"), (whole, "model")):
        found = best(2, memory=memory, allowed=[(2, 1)], most_batch=1).estimate
        assert found is not None
        assert found.residency == residency


def test_bursty_arrivals_wait_longer() -> None:
    rate = replace(REFERENCE, required_rps=15.0)
    calm, bursty = (best(1, objective=rate, allowed=[(1, 1)], arrival_cv=cv).estimate for cv in (0.1, 4.0))
    assert calm is not None
    assert bursty is not None
    assert calm.latency_s < bursty.latency_s


def test_spotserve_uses_all_devices_and_divides_the_layers() -> None:
    for devices in range(1, 13):
        choice = choose(costs(), devices, REFERENCE, Limits(1 << 40), "spotserve")
        config = choice.config
        assert config is not None
        assert SPEC.layers % config.stages == 0
        assert config.shards in (1, 2, 4)
        assert config.replicas == devices // config.replica_devices


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(InvalidInput, match="perennial, spotserve"):
        choose(costs(), 2, REFERENCE, Limits(1), "best")  # type: ignore[arg-type]


def test_a_book_has_a_plan_for_every_state_and_says_what_less_means() -> None:
    memory = costs().memory_bytes(ParallelConfig(1, 2, 1, 1), 128)
    small = InstanceType("small", 1, "CPU", memory, 1e9, 1e9, 0.0, 0.0)
    large = InstanceType("large", 2, "CPU", 2 * memory, 1e9, 1e9, 0.0, 0.0)
    book = build_book(SPEC, ClusterSpec("two kinds", (small, large), (3, 1)), costs(), REFERENCE, profile_sha256="x")
    assert len(book.plans) == 4 * 2 - 1
    one = book.plan_for(ClusterState.of({"small": 1}))
    assert one.config is None
    assert "nothing is left" in one.fewer
    assert "no longer fits" in book.plan_for(ClusterState.of({"small": 2})).fewer
    mixed = book.plan_for(ClusterState.of({"small": 2, "large": 1}))
    assert "one small less" in mixed.fewer
    assert "one large less" in mixed.fewer
    assert mixed.estimate is not None
    assert mixed.estimate.memory_bytes <= memory
    assert PlanBook.from_bytes(book.to_bytes()) == book


@pytest.mark.parametrize("policy", ["perennial", "spotserve"])
def test_moves_between_neighbouring_states_are_predicted(policy: Policy) -> None:
    memory = costs().memory_bytes(ParallelConfig(1, 2, 1, 1), 128)
    kind = InstanceType("small", 1, "CPU", memory, 1e9, 1e9, 0.3, 0.1)
    book = build_book(SPEC, ClusterSpec("one kind", (kind,), (5,)), costs(), replace(REFERENCE, slo_s=0.5), policy)
    for plan in book.plans[1:]:
        assert plan.config is not None
        assert plan.estimate is not None
        assert plan.estimate.price_usd_h == pytest.approx(0.1 * plan.config.devices)
        (loss,) = book.losses(plan)
        assert (loss.move is None) == (loss.config in (None, plan.config))
        assert loss.move is None or " s of pause" in plan.fewer
        assert plan.transitions == ()
    with pytest.raises(InvalidInput, match="perennial, spotserve, hysteresis, journey"):
        build_book(SPEC, ClusterSpec("x", (kind,), (1,)), costs(), REFERENCE, "best")  # type: ignore[arg-type]
