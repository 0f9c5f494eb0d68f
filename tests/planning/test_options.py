"""Which layouts are worth considering."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planning.options import Option, lost_s, shortlist

costs = st.floats(0.1, 100.0)
options = st.lists(
    st.builds(Option, st.integers(), st.sampled_from("abc"), st.integers(1, 20), costs), min_size=1, max_size=60
)


@given(options, st.integers(1, 10))
def test_the_best_of_the_fewest_instances_is_always_kept(given: list[Option[int]], most: int) -> None:
    fewest = min(one.instances for one in given)
    best = min(one.cost for one in given if one.instances == fewest)
    for kept in (shortlist(given), shortlist(given, most)):
        assert min(kept, key=lambda one: (one.instances, one.cost)).cost == best
        assert kept[0].instances == fewest
        assert set(kept) <= set(given)
    assert len(shortlist(given, most)) <= most


@given(options)
def test_nothing_kept_is_beaten_by_fewer_replicas_or_three_others(given: list[Option[int]]) -> None:
    kept = shortlist(given)
    for one in kept:
        smaller = [other for other in given if other.family == one.family and other.instances < one.instances]
        assert all(one.cost < other.cost for other in smaller)
        assert sum(other.instances == one.instances for other in kept) <= 3


def test_a_change_costs_its_pause_and_slower_steps() -> None:
    assert lost_s(4, pause_s=0.5, prepare_s=10.0, slowdown=1.25) == 4 * (0.5 + 2.5)
