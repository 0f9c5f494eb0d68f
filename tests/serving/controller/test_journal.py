from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import pytest

from data.errors import CorruptData, InvalidInput
from serving.controller.journal import Journal, JournalFull, Segment
from serving.requests import GenerationRequest, Sampling, TopLogprob


def request(name: str, tokens: int = 3) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt=tuple(range(tokens)), sampling=Sampling(seed=7))


def segment(*tokens: int) -> Segment:
    return Segment(list(tokens), [-0.5] * len(tokens), [[TopLogprob(token, -1.0)] for token in tokens])


@asynccontextmanager
async def opened(path: Path, **options: int) -> AsyncIterator[Journal]:
    journal = Journal(str(path), **options)
    try:
        yield journal
    finally:
        journal.close()


async def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    async with opened(tmp_path / "deep" / "journal") as journal:
        await asyncio.gather(*(journal.admit(key, request(f"r{key}"), 100.0 + key) for key in range(1, 4)))
        await journal.commit([(1, 0, segment(5, 6)), (2, 0, segment(9))], [(2, "length")])
        await journal.commit([(1, 2, segment(7))], [])
        await journal.set_meta("epoch", 12)
    async with opened(tmp_path / "deep" / "journal") as journal:
        first, second, third = journal.load(finished=10)
        assert journal.meta("epoch", 0) == 12
    assert (first.key, first.request, first.admitted, first.finish) == (1, request("r1"), 101.0, None)
    assert first.output == segment(5, 6, 7)
    assert (second.finish, second.output) == ("length", segment(9))
    assert third.output == segment()


async def test_only_the_latest_finished_requests_are_loaded_but_all_unfinished_ones(tmp_path: Path) -> None:
    async with opened(tmp_path / "journal") as journal:
        for key in range(1, 7):
            await journal.admit(key, request(f"r{key}"), 0.0)
        await journal.commit([], [(key, "stop") for key in (1, 3, 4, 6)])
    async with opened(tmp_path / "journal") as journal:
        assert [stored.key for stored in journal.load(finished=2)] == [2, 4, 5, 6]


async def test_commits_that_meet_go_to_disk_in_one_transaction(tmp_path: Path) -> None:
    async with opened(tmp_path / "journal") as journal:
        await journal.admit(1, request("r"), 0.0)
        log = tmp_path / "journal-wal"
        before = log.stat().st_size
        await journal.commit([(1, 0, segment(0))], [])
        alone = log.stat().st_size - before
        await asyncio.gather(*(journal.commit([(1, at, segment(at))], []) for at in range(1, 101)))
        assert log.stat().st_size - before - alone < 20 * alone
        (stored,) = journal.load(0)
        assert stored.output.tokens == list(range(101))


async def test_forgotten_requests_leave_nothing_and_their_ids_are_free(tmp_path: Path) -> None:
    async with opened(tmp_path / "journal") as journal:
        for key in (1, 2):
            await journal.admit(key, request(f"r{key}"), 0.0)
            await journal.commit([(key, 0, segment(1, 2))], [(key, "stop")])
        await journal.forget([1])
        await journal.admit(3, request("r1"), 0.0)
        journal.withdraw(3)
        await journal.admit(4, request("r1"), 0.0)
        assert [stored.key for stored in journal.load(10)] == [2, 4]
    with closing(sqlite3.connect(tmp_path / "journal")) as database:
        assert database.execute("SELECT DISTINCT key FROM tokens").fetchall() == [(2,)]


_WRITER = """
import asyncio, sys
from serving.controller.journal import Journal
from tests.serving.controller.test_journal import request, segment

async def main() -> None:
    journal = Journal(sys.argv[1])
    await journal.admit(1, request("r"), 0.0)
    for index in range(1_000_000):
        await journal.commit([(1, index, segment(index))], [])
        sys.stdout.write(f"{index}\\n")
        sys.stdout.flush()

asyncio.run(main())
"""


def _write_until_killed(path: Path, after: int) -> list[int]:
    """What another process said it had committed."""
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer, writer.stdout:
        said = [int(writer.stdout.readline()) for _ in range(after)]
        writer.send_signal(signal.SIGKILL)
        return said + [int(line) for line in writer.stdout if line.endswith("\n")]


async def test_every_committed_token_survives_a_kill_of_the_writer(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    said = _write_until_killed(path, after=200)
    async with opened(path) as journal:
        (stored,) = journal.load(0)
        tokens = stored.output.tokens
        assert tokens == list(range(len(tokens)))
        assert len(tokens) in (said[-1] + 1, said[-1] + 2)  # one may have been committed and not said
        await journal.commit([(1, len(tokens), segment(4))], [(1, "length")])


@pytest.mark.parametrize("content", [b"this is not a database, and longer than a header of one" * 100, bytes(8192)])
async def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(CorruptData, match="not a usable journal"):
        Journal(str(tmp_path / "journal"))
    assert (tmp_path / "journal").read_bytes() == content


async def test_a_truncated_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with opened(path) as journal:
        for key in range(1, 200):
            await journal.admit(key, request(f"r{key}", tokens=300), 0.0)
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)
    with pytest.raises(CorruptData, match="not a usable journal"):
        async with opened(path) as journal:
            journal.load(0)


@pytest.mark.parametrize(
    "damage",
    ["UPDATE tokens SET body=x'ff'", "UPDATE requests SET body=x'01'", "DELETE FROM tokens WHERE start=0"],
)
async def test_damaged_records_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "journal"
    async with opened(path) as journal:
        await journal.admit(1, request("r"), 0.0)
        await journal.commit([(1, 0, segment(1))], [])
        await journal.commit([(1, 1, segment(2))], [])
    with closing(sqlite3.connect(path)) as database:
        database.execute(damage)
        database.commit()
    async with opened(path) as journal:
        with pytest.raises(CorruptData):
            journal.load(0)


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with opened(path) as journal:
        await journal.set_meta("schema", 99)
    for _ in range(2):
        with pytest.raises(CorruptData, match="newer version"):
            Journal(str(path))


async def test_a_journal_has_one_controller(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with opened(path):
        with pytest.raises(InvalidInput, match="another controller"):
            Journal(str(path))
    async with opened(path) as journal:
        assert journal.load(0) == []


async def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidInput, match="cannot write the journal"):
        Journal(str(tmp_path / "file" / "journal"))


async def _fill(journal: Journal, first: int = 1) -> int:
    """Admit until the journal is full; returns the next key."""
    for key in range(first, 10_000):
        try:
            await journal.admit(key, request(f"r{key}", tokens=400), 0.0)
        except JournalFull:
            return key
    raise AssertionError("it never got full")


async def _commit_for_ever(journal: Journal) -> None:
    for at in range(0, 1_000_000, 100):
        await journal.commit([(1, at, segment(*range(100)))], [])


async def test_a_full_journal_refuses_new_requests_and_lets_running_ones_end(tmp_path: Path) -> None:
    async with opened(tmp_path / "journal", reserve_bytes=1 << 18, max_bytes=1 << 20) as journal:
        refused = await _fill(journal)
        for at in range(0, 4000, 40):
            await journal.commit([(1, at, segment(*range(at, at + 40)))], [])
        await journal.commit([], [(1, "length")])
        await journal.set_meta("epoch", 3)
        for _ in range(2):
            with pytest.raises(JournalFull):
                await journal.admit(refused, request(f"r{refused}", tokens=400), 0.0)
        stored = journal.load(1)
        assert len(stored) == refused - 1
        assert (stored[0].finish, len(stored[0].output.tokens)) == ("length", 4000)


async def test_a_journal_that_got_room_again_admits_again(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    async with opened(path, reserve_bytes=1 << 18, max_bytes=1 << 20) as journal:
        refused = await _fill(journal)
        await journal.commit([(1, at, segment(*range(100))) for at in range(0, 4000, 100)], [])
        await journal.forget(list(range(2, refused)))
        await journal.admit(refused, request("new"), 0.0)
    assert (tmp_path / "journal-reserve").stat().st_size == 1 << 18


async def test_more_than_the_reserve_is_an_error_that_ends_when_there_is_room(tmp_path: Path) -> None:
    async with opened(tmp_path / "journal", reserve_bytes=1 << 16, max_bytes=1 << 20) as journal:
        refused = await _fill(journal)
        with pytest.raises(JournalFull):
            await _commit_for_ever(journal)
        await journal.forget(list(range(2, refused)))
        await journal.commit([], [(1, "length")])


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes rights that this user does not have")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill_disk(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


async def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        async with opened(disk / "journal", reserve_bytes=1 << 20) as journal:
            await journal.admit(1, request("r1"), 0.0)
            fill_disk(disk)
            refused = await _fill(journal, first=2)
            for at in range(1000):  # as many pages of the WAL would fill the disk
                await journal.commit([(1, at, segment(at))], [])
            with pytest.raises(JournalFull):
                await journal.admit(refused, request("again"), 0.0)
            (disk / "filler").unlink()
            await journal.admit(refused, request("again"), 0.0)
            assert journal.load(0)[0].output.tokens == list(range(1000))


async def test_no_room_for_a_new_journal(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "filler").write_bytes(bytes(48 << 10))
        with pytest.raises(InvalidInput, match="free some space"):
            Journal(str(disk / "journal"))


async def test_a_record_that_the_journal_refuses_harms_no_other(tmp_path: Path) -> None:
    async with opened(tmp_path / "journal") as journal:
        await journal.admit(1, request("r1"), 0.0)
        results = await asyncio.gather(
            journal.admit(1, request("same key"), 0.0),
            journal.commit([(1, 0, segment(1))], []),
            journal.set_meta("epoch", 1 << 80),
            journal.commit([(1, 1, segment(2))], []),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [CorruptData, type(None), CorruptData, type(None)]
        (stored,) = journal.load(0)
        assert stored.output.tokens == [1, 2]
