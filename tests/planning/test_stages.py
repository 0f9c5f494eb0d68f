"""Cuts into stages are the best there are, by comparison with all of them."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import Infeasible, InvalidInput
from data.placement import Shape
from planning.stages import LayerCost, cut_stages

COSTS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8)


def layers(costs: list[tuple[int, int]]) -> list[LayerCost]:
    return [LayerCost({1: float(s), 2: s * 0.6}, {1: float(b), 2: b / 2}) for s, b in costs]


def every_cut(costs: list[tuple[int, int]], stages: int, budget: int) -> list[tuple[int, int]]:
    """(slowest, largest) of every partition that fits."""
    found = []
    for inner in combinations(range(1, len(costs)), stages - 1):
        edges = [0, *inner, len(costs)]
        parts = [costs[a:b] for a, b in pairwise(edges)]
        largest = max(sum(b for _, b in part) for part in parts)
        if largest <= budget:
            found.append((max(sum(s for s, _ in part) for part in parts), largest))
    return found


@settings(deadline=None)
@given(costs=COSTS, stages=st.integers(1, 4), budget=st.integers(5, 80))
def test_no_partition_is_better(costs: list[tuple[int, int]], stages: int, budget: int) -> None:
    if stages > len(costs):
        with pytest.raises(InvalidInput, match="fewer stages"):
            cut_stages(layers(costs), Shape(1, stages), budget)
        return
    possible = every_cut(costs, stages, budget)
    if not possible:
        with pytest.raises(Infeasible):
            cut_stages(layers(costs), Shape(1, stages), budget)
        return
    cut = cut_stages(layers(costs), Shape(1, stages), budget)
    assert (max(cut.seconds), max(cut.weight_bytes)) == pytest.approx(min(possible))
    assert sum(cut.layers) == len(costs)
    assert min(cut.layers) >= 1


def test_shards_have_their_own_costs() -> None:
    assert cut_stages(layers([(2, 4), (2, 4)]), Shape(2, 2)).profile.latency_s == pytest.approx((1.2, 1.2))
    with pytest.raises(InvalidInput, match="4 shards"):
        cut_stages(layers([(2, 4), (2, 4)]), Shape(4, 2))
