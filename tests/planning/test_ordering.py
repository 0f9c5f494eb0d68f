"""The layer order: the reference's example, and bounds that hold for any change."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from data.layout import ParallelConfig
from planning.ordering import Role, layer_order, natural_peak


def roles(config: ParallelConfig) -> list[Role]:
    return [(position.stage, position.shard) for position in config.positions() if position.replica == 0]


def test_example_of_the_reference() -> None:
    old, new = ParallelConfig(1, 2, 1, 1), ParallelConfig(1, 3, 1, 1)
    survivors = [((0, 0), (0, 0)), ((1, 0), (1, 0))]
    found = layer_order(12, old, new, survivors)
    assert found.order == (0, 1, 2, 3, 6, 7, 8, 4, 9, 5, 10, 11)
    assert found.peak_layers == 0
    assert natural_peak(12, old, new, survivors) == 2


@given(
    st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4)),
    st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4)),
    st.sampled_from([0.0, 0.5, 2.0, 10.0]),
    st.randoms(use_true_random=False),
)
def test_orders_are_complete_and_keep_to_the_limit_if_they_can(
    before: tuple[int, int], after: tuple[int, int], tolerance: float, random: object
) -> None:
    old, new = ParallelConfig(1, *before, 1), ParallelConfig(1, *after, 1)
    targets: list[Role | None] = [*roles(new), *[None] * len(roles(old))]
    random.shuffle(targets)  # type: ignore[attr-defined]
    survivors = list(zip(roles(old), targets, strict=False))
    found = layer_order(12, old, new, survivors, tolerance)
    assert sorted(found.order) == list(range(12))
    if not found.limited:
        assert found.order == tuple(range(12))
        assert found.peak_layers <= tolerance * 12 / old.stages / old.shards + 1e-9
    assert layer_order(12, old, new, survivors, 1e9).order == tuple(range(12))


def test_nobody_to_protect() -> None:
    found = layer_order(4, ParallelConfig(1, 1, 1, 1), ParallelConfig(1, 2, 1, 1), [])
    assert (found.order, found.limited, found.peak_layers) == ((0, 1, 2, 3), False, 0)
