"""How the journal lays out, reads back and forgets the tokens of many requests at once."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from data.errors import CorruptData
from serving.controller.journal import Journal, Segment
from serving.requests import GenerationRequest, TopLogprob


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    opened = Journal(str(tmp_path / "journal.db"))
    yield opened
    opened.close()


def segment(key: int, start: int, count: int) -> Segment:
    tokens = [1000 * key + index for index in range(start, start + count)]
    top = [[TopLogprob(token_id=token, logprob=-0.25)] for token in tokens]
    return Segment(tokens, [-0.5] * count, top)


async def write(journal: Journal, keys: range, steps: int) -> None:
    for key in keys:
        request = GenerationRequest(request_id=f"r{key}", prompt=(key,))
        await journal.admit(key, request, admitted=float(key))
    for step in range(steps):
        await journal.commit([(key, 2 * step, segment(key, 2 * step, 2)) for key in keys], [])


def rows(path: Path, table: str) -> int:
    with sqlite3.connect(path / "journal.db") as database:
        return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


async def test_interleaved_streams_come_back_whole(journal: Journal) -> None:
    await write(journal, range(1, 601), steps=3)  # more rows than one INSERT takes
    await journal.commit([], [(7, "length"), (600, "stop")])
    stored = journal.load(finished=10)
    assert [one.key for one in stored] == list(range(1, 601))
    assert all(one.output == segment(one.key, 0, 6) for one in stored)
    assert {one.key: one.finish for one in stored if one.finish} == {7: "length", 600: "stop"}


async def test_only_the_latest_finished_requests_are_read(journal: Journal) -> None:
    await write(journal, range(1, 6), steps=1)
    await journal.commit([], [(1, "stop"), (2, "stop"), (4, "stop")])
    assert [one.key for one in journal.load(finished=1)] == [3, 4, 5]


async def test_forgetting_leaves_the_others_alone(journal: Journal, tmp_path: Path) -> None:
    await write(journal, range(1, 5), steps=2)
    await journal.commit([], [(1, "stop"), (3, "stop")])
    await write(journal, range(5, 7), steps=2)
    await journal.commit([(2, 4, segment(2, 4, 1))], [])
    await journal.forget([1, 3])
    stored = {one.key: one.output for one in journal.load(finished=10)}
    assert sorted(stored) == [2, 4, 5, 6]
    assert stored[2] == segment(2, 0, 5)
    assert (rows(tmp_path, "tokens"), rows(tmp_path, "requests")) == (9, 4)


async def test_what_is_not_loaded_can_be_deleted(journal: Journal, tmp_path: Path) -> None:
    await write(journal, range(1, 6), steps=2)
    await journal.commit([], [(1, "stop"), (2, "stop"), (4, "stop")])
    left = journal.load(finished=1)
    journal.trim(finished=1)
    await journal.set_meta("any", 1)  # the writer goes in order
    assert journal.load(finished=10) == left
    assert (rows(tmp_path, "tokens"), rows(tmp_path, "requests")) == (6, 3)


async def test_a_request_that_ended_without_tokens_can_be_forgotten(journal: Journal, tmp_path: Path) -> None:
    await write(journal, range(1, 2), steps=0)
    await journal.commit([], [(1, "abort")])
    await journal.forget([1])
    assert rows(tmp_path, "requests") == 0


async def test_rows_are_reused_after_everything_was_forgotten(journal: Journal) -> None:
    await write(journal, range(1, 3), steps=2)
    await journal.commit([], [(1, "stop"), (2, "stop")])
    await journal.forget([1, 2])
    await write(journal, range(3, 5), steps=2)
    await journal.commit([], [(3, "stop")])
    await journal.forget([3])
    (left,) = journal.load(finished=10)
    assert (left.key, left.output) == (4, segment(4, 0, 4))


async def test_a_gap_between_rows_is_damage(journal: Journal) -> None:
    await write(journal, range(1, 2), steps=1)
    await journal.commit([(1, 3, segment(1, 3, 1))], [])
    with pytest.raises(CorruptData, match="tokens missing before position 3"):
        journal.load(finished=0)
