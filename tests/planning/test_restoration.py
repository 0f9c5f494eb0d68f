from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planning.resharding import KvBox
from planning.restoration import Keeper, Rates, apart, holder, restorable_tokens, worth_restoring
from tests.planning.fleets import SPEC


@given(
    st.lists(
        st.tuples(
            st.integers(0, SPEC.layers - 1), st.integers(1, SPEC.layers),
            st.integers(0, SPEC.kv_heads - 1), st.integers(1, SPEC.kv_heads), st.integers(0, 50),
        ),
        max_size=8,
    )
)  # fmt: skip
def test_a_prefix_is_restorable_if_every_cell_has_it(parts: list[tuple[int, int, int, int, int]]) -> None:
    held = [
        (KvBox((a, min(SPEC.layers, a + b)), (c, min(SPEC.kv_heads, c + d))), tokens) for a, b, c, d, tokens in parts
    ]
    cells = [
        max((t for box, t in held if box.layers[0] <= layer < box.layers[1] and box.heads[0] <= head < box.heads[1]),
            default=0)
        for layer in range(SPEC.layers)
        for head in range(SPEC.kv_heads)
    ]  # fmt: skip
    assert restorable_tokens(SPEC, held) == min(cells)


def keepers(*loads: tuple[str, int]) -> list[Keeper]:
    return [Keeper(instance, "", load) for instance, load in loads]


def test_copies_go_to_another_instance_the_least_burdened_first() -> None:
    assert holder("a", "", keepers(("a", 0), ("b", 2), ("c", 1))) == 2
    assert holder("b", "", keepers(("a", 0), ("b", 0), ("c", 0)), after=2) == 2
    assert holder("a", "", keepers(("a", 0), ("a", 3))) is None
    assert holder("a", "", []) is None


@given(
    st.sampled_from("abc"),
    st.sampled_from(["", "x", "y"]),
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["", "x", "y", "z"]), st.integers(0, 3))),
    st.integers(0, 5),
)
def test_never_the_same_instance_nor_zone_where_that_can_be_helped(
    own: str, zone: str, told: list[tuple[str, str, int]], after: int
) -> None:
    candidates = [Keeper(*fields) for fields in told]
    others = [one for one in candidates if one.instance != own]
    index = holder(own, zone, candidates, after)
    if index is None:
        assert not others
        return
    chosen, elsewhere = candidates[index], [one for one in others if apart(zone, one.zone)]
    assert chosen in others
    assert apart(zone, chosen.zone) == bool(elsewhere)
    assert chosen.load == min(one.load for one in elsewhere or others)


def test_a_slow_link_makes_computing_again_worth_while() -> None:
    assert worth_restoring(2048 << 17, 2048, Rates(12.5e9, 44_800.0))
    assert not worth_restoring(2048 << 17, 2048, Rates(3.1e9, 44_800.0))
