"""The published edge weight, against the worked example and against its formula in fractions."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from data.layout import ParallelConfig, Position
from planning.edge_weights import GptShape, InterruptedBatches, edge_weights, weight_unit

TOY = GptShape(layers=12, vocab=1000, hidden=64, max_seq=640)


def test_worked_example_of_the_reference() -> None:
    old, new = ParallelConfig(1, 3, 2, 1), ParallelConfig(1, 2, 2, 1)
    weights = edge_weights(TOY, old, new, [Position(0, 0, 0), None], InterruptedBatches([2], 640, [0]))
    assert weights[0, 0] / weight_unit(TOY, old, new) == 5800.125
    assert not weights[1].any()


@given(
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 4),
)
def test_weights_follow_the_formula(old_p: int, new_p: int, old_m: int, new_m: int, batch: int) -> None:
    old, new = ParallelConfig(1, old_p, old_m, 1), ParallelConfig(2, new_p, new_m, 1)
    held = list(old.positions())
    weights = edge_weights(TOY, old, new, held, InterruptedBatches([batch], 640, [1, 0]))
    for row, have in enumerate(held):
        for column, want in enumerate(new.positions()):
            kv = batch if want.replica == 1 else 0
            low = max(Fraction(have.shard, old_m), Fraction(want.shard, new_m))
            high = min(Fraction(have.shard + 1, old_m), Fraction(want.shard + 1, new_m))
            ours, theirs = (set(range(*config.stage_layers(at.stage, 12))) for config, at in ((old, have), (new, want)))
            weight = len(ours & theirs) * (6 + max(high - low, Fraction(0)) * (12 * 64 + 7 + kv * 640)) + 1640
            if have.stage == old_p - 1 and want.stage == new_p - 1:
                weight += 1002
            weight += Fraction((640 + 3 * 64 + 4) * kv, 64)
            assert Fraction(int(weights[row, column]), weight_unit(TOY, old, new)) == weight
