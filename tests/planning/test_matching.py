"""Matchings equal what trying every permutation finds."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import Infeasible
from planning.matching import Matrix, best_matching, matched_value, near_matching


@st.composite
def matrices(draw: st.DrawFn, most: int = 7) -> Matrix:
    rows = draw(st.integers(1, most))
    columns = draw(st.integers(1, rows))
    cells = st.lists(st.integers(0, 5), min_size=columns, max_size=columns)
    return np.array(draw(st.lists(cells, min_size=rows, max_size=rows)), dtype=np.int64) * 1024


@settings(deadline=None, max_examples=60)
@given(matrices(most=6), st.randoms(use_true_random=False))
def test_value_then_preference_are_best(values: Matrix, random: np.random.Generator) -> None:
    preference = np.array([[random.randint(0, 2) for _ in row] for row in values], dtype=np.int64)
    columns = np.arange(values.shape[1])

    def worth(rows: list[int]) -> tuple[int, int]:
        return int(values[rows, columns].sum()), int(preference[rows, columns].sum())

    every = (worth(list(rows)) for rows in permutations(range(len(values)), len(columns)))
    assert worth(best_matching(values, preference)) == max(every)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_near_matching_is_best_among_those_on_fewest_instances(size: int, count: int, data: st.DataObject) -> None:
    columns = min(size * count, 6 - 6 % size)
    rows = data.draw(st.integers(columns, 6))
    instances = data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    row = st.lists(st.integers(0, 3), min_size=columns, max_size=columns)
    values = np.array(data.draw(st.lists(row, min_size=rows, max_size=rows)), dtype=np.int64)
    groups = [column // size for column in range(columns)]

    def worth(chosen: list[int]) -> tuple[int, int]:
        touched = {(groups[column], instances[row]) for column, row in enumerate(chosen)}
        return -len(touched), matched_value(values, chosen)

    every = (worth(list(chosen)) for chosen in permutations(range(rows), columns))
    assert worth(near_matching(values, None, instances, groups)) == max(every)


def test_shards_interleave_over_the_instances_of_a_group() -> None:
    """Each instance holds shards 0-3 of 4; as one group of 8 each can keep every device's half (§6.4)."""
    held = [shard for _ in range(2) for shard in range(4)]
    values = np.array([[int(shard == want // 2) for want in range(8)] for shard in held], dtype=np.int64)
    assert matched_value(values, near_matching(values, None, [0] * 4 + [1] * 4, [0] * 8)) == 8


def test_groups_of_large_fleets_keep_to_the_fewest_instances() -> None:
    random = np.random.default_rng(3)
    values = random.integers(0, 1000, (64, 64))
    instances, groups = [row // 8 for row in range(64)], [column // 4 for column in range(64)]
    rows = near_matching(values, None, instances, groups)
    touched = {(groups[column], instances[row]) for column, row in enumerate(rows)}
    assert sorted(rows) == list(range(64))
    assert len(touched) == 16
    assert matched_value(values, rows) > 0.8 * matched_value(values, best_matching(values))


def test_too_few_devices_are_refused() -> None:
    with pytest.raises(Infeasible, match="3 positions"):
        best_matching(np.zeros((2, 3), dtype=np.int64))
