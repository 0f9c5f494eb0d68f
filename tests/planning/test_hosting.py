from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.deployment import Deployment
from data.layout import ParallelConfig
from data.placement import Group, Placement, Shape
from planning.hosting import deployment_of, placement_of, shared_fleet, speeds_of
from planning.placement.feasibility import breaches
from planning.uneven import quickest_partition
from tests.planning.tenants import MIB, cluster, costs, tenant

MEMORY = 256 * MIB
SINGLE = Shape(1, 1)
TENANTS = [tenant(name) for name in ("a", "b", "c")]


def test_a_batch_is_a_line_of_stages_that_takes_as_long_and_finishes_as_many() -> None:
    one = tenant(slo_s=30.0)
    serving = one.serving(SINGLE, MEMORY)
    assert serving is not None
    batch = serving.config.max_batch
    assert batch == one.most_batch
    line = serving.profile.latency_s
    assert sum(line) == pytest.approx(one.costs.request_latency_s(serving.config, batch, 32, 32))
    assert 1 / max(line) == pytest.approx(one.costs.throughput(serving.config, batch, 32, 32))


def test_a_tight_limit_means_small_batches_and_one_that_cannot_be_kept_the_smallest() -> None:
    batches = []
    for slo_s in (30.0, 0.6, 0.4, 0.1):
        serving = tenant(slo_s=slo_s).serving(SINGLE, MEMORY)
        assert serving is not None
        batches.append(serving.config.max_batch)
    assert all(tighter <= loose for loose, tighter in pairwise(batches))
    assert (batches[0], batches[-1]) == (8, 1)


def test_what_does_not_fit_is_not_served() -> None:
    assert tenant().serving(SINGLE, MIB) is None
    assert tenant().serving(Shape(4, 1), MEMORY) is None  # four shards were not measured
    assert tenant().serving(Shape(1, 9), MEMORY) is None  # eight layers


@settings(deadline=None)  # the first ones work out how every shape serves
@given(st.lists(st.tuples(st.sampled_from([1, 2]), st.integers(1, 4), st.sets(st.integers(0, 2), min_size=1))))
def test_placements_become_deployments_and_come_back(drawn: list[tuple[int, int, set[int]]]) -> None:
    placement = Placement(tuple(Group(Shape(t, p), tuple(sorted(models))) for t, p, models in drawn))
    deployment = deployment_of(placement, TENANTS, MEMORY)
    assert sorted(placement_of(deployment, ["a", "b", "c"]).groups, key=repr) == sorted(placement.groups, key=repr)
    if deployment is not None:
        assert all(sum(one.kv_share for one in group.hosted) == pytest.approx(1) for group in deployment.groups)
        speeds = speeds_of([deployment, None], TENANTS, MEMORY)
        hosted = {(name, group.stages, group.shards) for group in deployment.groups for name in group.models}
        assert {(one.model, one.stages, one.shards) for one in speeds} == hosted


def test_models_that_have_gone_are_left_out() -> None:
    deployment = deployment_of(
        Placement((Group(SINGLE, (0, 1)), Group(SINGLE, (1,)))), [tenant("a"), tenant("b")], MEMORY
    )
    assert isinstance(deployment, Deployment)
    assert placement_of(deployment, ["a"]) == Placement((Group(SINGLE, (0,)),))


def test_the_fleet_knows_every_shape_and_keeps_the_memory_rule() -> None:
    fleet = shared_fleet([tenant("a"), tenant("b")], cluster(devices=2).types[0], 4, reserve_bytes=MIB)
    assert fleet.budget_bytes == 255 * MIB
    assert {(one.shards, one.stages) for one in fleet.shapes} == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)}
    assert not breaches(fleet, Placement((Group(Shape(2, 2), (0, 1)),)))
    small = shared_fleet([tenant("a"), tenant("b")], cluster(memory_mib=25).types[0], 1)
    assert "more than" in breaches(small, Placement((Group(SINGLE, (0, 1)),)))[0]


def test_a_heavy_head_takes_layers_from_the_last_stage() -> None:
    heavy = costs(head_ms=4.0)
    partition = quickest_partition(heavy, Shape(1, 2), 2, 48)
    assert partition == (6, 2)
    assert heavy.decode_s(ParallelConfig(1, 2, 1, 2, partition), 2, 48) < heavy.decode_s(
        ParallelConfig(1, 2, 1, 2), 2, 48
    )
    assert quickest_partition(costs(head_ms=4.0, layers=32), Shape(1, 8), 8, 48) == (4, 4, 4, 4, 5, 5, 5, 1)
    assert quickest_partition(costs(), Shape(1, 2), 2, 48) == ()
    assert quickest_partition(heavy, SINGLE, 2, 48) == ()
