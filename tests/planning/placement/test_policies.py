"""Published policies: they fill memory as they say, skipping changes nothing, and exact programs beat heuristics."""

from __future__ import annotations

from itertools import product

import pytest

from data.errors import InvalidInput
from data.placement import Group, Placement, Shape
from planning.placement.baselines import clockwork, mp_greedy, mp_round_robin, sr_greedy, sr_uniform
from planning.placement.beam import beam
from planning.placement.buckets import device_splits, model_buckets, mp_search_sep
from planning.placement.exact import mp_ilp, sr_ilp
from planning.placement.greedy import greedy
from planning.placement.partitions import uniform_partitions
from planning.placement.problem import Problem
from planning.placement.uniform import UniformSearch, mp_search
from tests.planning.shared_fleets import arrivals, fleet

pytestmark = pytest.mark.slow  # on a machine that has not compiled the kernels yet

ONE, TWO = Shape(1, 1), Shape(1, 2)


def problem(kinds: list[str], devices: int, *, slo_scale: float = 3.0, rate_rps: float = 3.0) -> Problem:
    return Problem(
        fleet(kinds, devices=devices, slo_scale=slo_scale, rate_rps=rate_rps),
        arrivals(len(kinds), duration_s=60.0, rate_rps=rate_rps),
    )


MIXED = problem(["large", "small", "small", "large", "small", "small"], 8)
SMALL = problem(["small"] * 6, 4)


def fits(planned: Problem, placement: Placement) -> bool:
    used = [
        sum(planned.costs.weights[m, planned.tables.shape_number(group.shape)] for m in group.models)
        for group in placement.groups
    ]
    return placement.devices <= planned.fleet.devices and max(used) <= planned.fleet.budget_bytes


def test_partitions_are_equal_groups_and_what_is_left() -> None:
    partitions = list(uniform_partitions(MIXED.fleet, 7))
    assert (TWO, TWO, TWO, ONE) in partitions
    assert (Shape(1, 4), ONE, TWO) in partitions
    assert all(sum(shape.devices for shape in shapes) == 7 for shapes in partitions)
    assert [len(list(uniform_partitions(MIXED.fleet, n))) for n in (4, 8)] == [6, 9]


@pytest.mark.parametrize(("devices", "parts", "splits"), [(24, 2, 23), (40, 2, 39), (64, 3, 581), (64, 4, 6783)])
def test_device_splits_are_as_many_as_published(devices: int, parts: int, splits: int) -> None:
    assert len(list(device_splits(devices, parts, 8))) == splits


def test_the_heuristic_fills_memory_until_no_group_has_room() -> None:
    placement, _ = greedy(MIXED, (ONE,) * 8)
    assert fits(MIXED, placement)
    for group, model in product(placement.groups, range(6)):
        fuller = Group(group.shape, (*group.models, model))
        assert model in group.models or not fits(MIXED, Placement((fuller,)))


@pytest.mark.parametrize("planned", [MIXED, SMALL])
def test_leaving_out_what_cannot_win_changes_nothing(planned: Problem) -> None:
    partitions = list(uniform_partitions(planned.fleet, planned.fleet.devices))
    lazy = UniformSearch.of(planned, partitions, planned.everyone, worth_bounding=0.0).run()
    whole = mp_search(planned, prune=False)
    assert lazy is not None
    assert (lazy.placement, lazy.score) == (whole.placement, whole.score)
    assert lazy.simulated <= whole.simulated
    for shapes, bound in zip(partitions, UniformSearch.of(planned, partitions, planned.everyone).bounds, strict=True):
        assert greedy(planned, shapes)[1] <= bound


def test_buckets_part_the_large_from_the_small_and_are_no_worse() -> None:
    assert model_buckets(MIXED) == [[0, 3], [1, 2, 4, 5]]
    lazy, whole = mp_search_sep(MIXED), mp_search_sep(MIXED, prune=False)
    assert (lazy.placement, lazy.score) == (whole.placement, whole.score)
    assert lazy.score >= mp_search(MIXED).score
    assert lazy.score == pytest.approx(MIXED.score(lazy.placement))


def test_a_wider_beam_is_no_worse_than_its_best_step() -> None:
    narrow = beam(SMALL, (ONE,) * 4, 1)
    assert narrow.score == pytest.approx(SMALL.score(narrow.placement))
    assert beam(SMALL, (ONE,) * 4, 3).score >= greedy(SMALL, (ONE,) * 4)[1] - 1e-9


def test_baselines_keep_to_memory_and_devices() -> None:
    for placement in (sr_greedy(MIXED), mp_round_robin(MIXED), mp_greedy(MIXED, 4)):
        assert fits(MIXED, placement)
    assert [len(group.models) for group in sr_uniform(SMALL).groups] == [4, 4, 4, 4]


def test_baselines_say_what_they_cannot_do() -> None:
    with pytest.raises(InvalidInput, match="equal size"):
        sr_uniform(MIXED)
    with pytest.raises(InvalidInput, match="divisor"):
        mp_greedy(MIXED, 3)


def test_clockwork_plans_every_window_anew() -> None:
    schedule = clockwork(SMALL, SMALL.arrivals, 20.0)
    assert len(schedule.placements) == 3
    assert all(fits(SMALL, placement) for placement in schedule.placements)


def test_integer_programs_serve_the_least_served_best() -> None:
    small = problem(["small", "small", "large"], 3)
    placement = sr_ilp(small)
    assert fits(small, placement)
    assert {model for group in placement.groups for model in group.models} == {0, 1, 2}
    assert mp_ilp(small).devices == 3
