from __future__ import annotations

import sqlite3
from pathlib import Path

import msgspec
import pytest

from data.errors import CorruptData
from serving.controller.history import is_journal, read_journal
from tests.serving.controller.test_journal import opened, request, segment


async def test_a_journal_is_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a journal"
    async with opened(path) as journal:
        for key, model in ((1, "a"), (2, "b"), (3, "a")):
            await journal.admit(key, msgspec.structs.replace(request(f"r{key}", 4 + key), model=model), 100.0 + key)
        await journal.commit([(1, 0, segment(5, 6)), (2, 0, segment(9))], [(2, "length")])
        await journal.commit([(1, 2, segment(7))], [])
        assert is_journal(path)
        assert read_journal(path) == [(101.0, "a", 5, 3), (102.0, "b", 6, 1), (103.0, "a", 7, 1)]
        await journal.commit([(3, 0, segment(1, 2))], [])
        assert read_journal(path)[2] == (103.0, "a", 7, 2)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_text("arrival_s,model\n")
    assert not is_journal(tmp_path / "history.csv")
    database = sqlite3.connect(tmp_path / "other.db")
    database.execute("CREATE TABLE other (name TEXT)")
    database.close()
    assert is_journal(tmp_path / "other.db")
    with pytest.raises(CorruptData, match="not a usable journal"):
        read_journal(tmp_path / "other.db")
