"""Groups that go together: totals by hand, and that a part of the instances sees what all see."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InvalidInput
from planning.shocks import Shocks

shocks = st.builds(Shocks, st.floats(1e-6, 10.0), st.floats(0.0, 1.0), st.floats(0.05, 500.0))


@given(shocks, st.integers(1, 40))
def test_every_instance_is_hit_as_often_as_said(one: Shocks, most: int) -> None:
    table = one.down(most)
    hit = np.arange(most + 1)[:, None] - np.arange(most + 1)[None, :]
    each = (table * hit).sum(axis=1)[1:] / np.arange(1, most + 1)
    assert each == pytest.approx(np.full(most, one.each_s), rel=1e-6)


@given(shocks, st.integers(2, 20))
def test_a_part_of_the_instances_sees_the_same_shocks(one: Shocks, most: int) -> None:
    """Leave one out at random: of groups of k that are hit, it is in k / n."""
    larger, smaller = one.down(most)[most], one.down(most - 1)[most - 1]
    for left, rate in enumerate(smaller[:-1]):
        hit = most - 1 - left
        apart = larger[most - hit] * comb(most - 1, hit) / comb(most, hit)
        among = larger[most - hit - 1] * comb(most - 1, hit) / comb(most, hit + 1)
        assert apart + among == pytest.approx(rate, rel=1e-6, abs=1e-12)


def test_alone_and_all_together() -> None:
    assert Shocks(2.0).down(3)[3] == pytest.approx([0.0, 0.0, 6.0, 0.0], abs=1e-6)
    assert Shocks(2.0, along=1.0).down(3)[3] == pytest.approx([2.0, 0.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("fields", [(-1.0, 0.1, 1.0), (1.0, 1.1, 1.0), (1.0, 0.1, 0.0)])
def test_impossible_shocks_are_refused(fields: tuple[float, float, float]) -> None:
    with pytest.raises(InvalidInput, match="no way to come or go"):
        Shocks(*fields)
