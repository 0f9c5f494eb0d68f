from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from serving.controller.records import Record, TextScanner
from serving.errors import Aborted, DeadlineExceeded
from serving.messages import Emission
from serving.requests import GenerationRequest, Limits


def record(tokenizer: Tokenizer | None = None, *stop: str) -> Record:
    scanner = TextScanner(tokenizer, stop) if tokenizer else None
    return Record(1, GenerationRequest(request_id="r", prompt=(1,), limits=Limits(stop=stop)), 0.0, None, scanner)


def append(one: Record, *tokens: int) -> None:
    for token in tokens:
        one.append(Emission(1, len(one.output), token, -0.25))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def read(tokenizer: Tokenizer, tokens: list[int], *stop: str) -> tuple[str, int | None]:
    """All text, and after how many tokens a stop string was complete."""
    scanner, text = TextScanner(tokenizer, stop), ""
    for count, token in enumerate(tokens, start=1):
        piece, stopped = scanner.push(token)
        text += piece
        if stopped:
            return text + scanner.flush(), count
    return text + scanner.flush(), None


def test_a_stop_string_over_many_tokens_is_found_and_never_released(tokenizer: Tokenizer) -> None:
    before, stop = ids(tokenizer, "hello "), ids(tokenizer, "STOP")
    assert len(stop) > 1
    tokens = [*before, *stop, *ids(tokenizer, " more")]
    assert read(tokenizer, tokens, "STOP", "unused") == ("hello ", len(before) + len(stop))


def test_text_that_only_looks_like_a_stop_string_comes_later(tokenizer: Tokenizer) -> None:
    scanner = TextScanner(tokenizer, ("STOP",))
    released = [scanner.push(token)[0] for token in ids(tokenizer, "aSTOb")]
    assert released[:4] == ["", "", "", "a"]
    assert "".join(released) + scanner.flush() == "aSTOb"


def test_a_token_that_the_tokenizer_fails_at_has_no_text(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    """A decoder that rewrites what it said before, which a stream of text cannot follow."""
    broken = Tokenizer.from_str(tokenizer.to_str())
    broken.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Replace("ab", "xyz")])
    assert read(broken, ids(tokenizer, "1ab2ab STOP 3"), "STOP")[0] == "1a2a "
    assert caplog.text.count("the tokenizer has no text for token") == 1


def test_the_earliest_of_several_stop_strings_counts(tokenizer: Tokenizer) -> None:
    assert read(tokenizer, ids(tokenizer, "one two three"), "two three", "ne t", "zzz")[0] == "o"


def test_characters_of_several_bytes_come_whole(tokenizer: Tokenizer) -> None:
    text = "naïve 日本語 🎉 done"
    scanner, pieces = TextScanner(tokenizer, ()), []
    for token in ids(tokenizer, text):
        pieces.append(scanner.push(token)[0])
    assert "".join(pieces) + scanner.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.data())
def test_released_text_is_the_text_before_the_first_stop_string(tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from("ab é🎉"), max_size=30))
    stop = data.draw(st.lists(st.text(st.sampled_from("ab é🎉"), min_size=1, max_size=4), max_size=3))
    tokens = ids(tokenizer, text)
    found, stopped = read(tokenizer, tokens, *stop)
    if stopped is None:
        assert found == text
        assert not any(one in text for one in stop)
    else:
        # complete at the earliest moment, and cut before the first of those complete then
        seen = tokenizer.decode(tokens[:stopped])
        assert found == seen[: min(at for one in stop if (at := seen.find(one)) >= 0)]
        assert not any(one in tokenizer.decode(tokens[: stopped - 1]) for one in stop)


@given(tokens=st.lists(st.integers(0, 299), max_size=40), cut=st.integers(0, 40))
def test_a_resumed_stream_reads_like_an_unbroken_one(tokenizer: Tokenizer, tokens: list[int], cut: int) -> None:
    whole = record(tokenizer, "zq")
    for token in tokens:
        if whole.finish is None:
            append(whole, token)
    if whole.finish is None:
        whole.close("length")
    whole.committed, whole.ended = len(whole.output), True
    cut = min(cut, len(whole.output))
    resumed = record(tokenizer, "zq")
    append(resumed, *whole.output[:cut])
    if resumed.finish is None:
        resumed.committed = cut
        assert whole.chunk(0).text == resumed.chunk(0).text + whole.chunk(cut).text


def test_a_finish_without_a_token_brings_the_text_that_was_held_back(tokenizer: Tokenizer) -> None:
    one = record(tokenizer, "STOP")
    append(one, *ids(tokenizer, "abST"))
    one.committed = 4
    seen = one.chunk(0).text
    one.close("length")
    one.ended = True
    assert seen + one.chunk(4).text == "abST"
    assert one.chunk(0).text == "abST"


async def test_listeners_see_what_is_committed_and_nothing_else() -> None:
    one = record()
    append(one, 5, 6, 7)
    one.committed = 2
    chunks = one.chunks(1)
    first = await anext(chunks)
    assert (first.output_index, first.token_ids, first.logprobs, first.finish) == (1, (6,), (-0.25,), None)
    waiting = asyncio.ensure_future(anext(chunks))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    one.close("length")
    one.committed, one.ended = 3, True
    one.notify()
    last = await asyncio.wait_for(waiting, 1.0)
    assert (last.output_index, last.token_ids, last.finish) == (2, (7,), "length")
    assert [chunk async for chunk in chunks] == []


@pytest.mark.parametrize(("finish", "error"), [("abort", Aborted), ("deadline", DeadlineExceeded)])
async def test_what_ended_badly_delivers_its_tokens_and_raises(finish: str, error: type[Exception]) -> None:
    one = record()
    append(one, 5, 6)
    one.finish, one.committed, one.ended = finish, 2, True  # type: ignore[assignment]
    chunks = one.chunks(0)
    assert (await anext(chunks)).token_ids == (5, 6)
    with pytest.raises(error, match="2 tokens"):
        await anext(chunks)
