from hypothesis import given
from hypothesis import strategies as st

from perennial.comparison import Difference, agreement, compare, indexed
from serving.requests import Chunk

tokens = st.lists(st.integers(0, 5), max_size=20)


def delivered(values: list[int]) -> list[tuple[int, int]]:
    return list(enumerate(values))


@given(tokens)
def test_a_stream_equals_itself(values: list[int]) -> None:
    assert not compare(values, delivered(values))
    assert agreement(values, values) == 1.0


@given(tokens, st.data())
def test_tokens_cut_off_are_lost_unless_the_client_cut_them(values: list[int], data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(values)))
    assert compare(values, delivered(values)[:kept]) == Difference(lost=len(values) - kept)
    assert not compare(values, delivered(values)[:kept], finished=False)


@given(tokens.filter(bool), st.data())
def test_a_missing_token_in_the_middle_is_lost_even_if_cancelled(values: list[int], data: st.DataObject) -> None:
    missing = data.draw(st.integers(0, len(values) - 1))
    stream = delivered(values)
    del stream[missing]
    assert compare(values, stream) == Difference(lost=1)
    assert compare(values, stream, finished=False) == Difference(lost=int(missing < len(values) - 1))


@given(tokens.filter(bool), st.data())
def test_a_repeated_stretch_is_duplicated(values: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(values) - 1))
    stream = delivered(values) + delivered(values)[start:]
    assert compare(values, stream) == Difference(duplicated=len(values) - start)


@given(tokens.filter(bool), st.data())
def test_another_token_is_mismatched(values: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(values) - 1))
    other = [*values[:at], values[at] + 1, *values[at + 1 :]]
    assert compare(values, delivered(other)) == Difference(mismatched=1)
    assert agreement(values, other) == at / len(values)


def test_tokens_beyond_the_end_are_mismatched() -> None:
    assert compare([1, 2], delivered([1, 2, 3])) == Difference(mismatched=1)


def test_tokens_out_of_order_are_noticed() -> None:
    assert compare([1, 2], [(1, 2), (0, 1)]) == Difference(duplicated=1)


def test_chunks_number_their_tokens() -> None:
    chunks = [Chunk(output_index=0, token_ids=(7, 8)), Chunk(output_index=2, token_ids=(9,), finish="length")]
    assert indexed(chunks) == [(0, 7), (1, 8), (2, 9)]
