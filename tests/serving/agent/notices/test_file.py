from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from serving.agent.notices.file import NoticeFile
from tests.serving.agent.notices.listening import listening


def write(path: Path, content: str) -> None:
    """All at once, as whoever announces something should."""
    path.with_suffix(".part").write_text(content)
    path.with_suffix(".part").replace(path)


@pytest.mark.parametrize(
    ("content", "seconds"), [("12.5\n", 12.5), ("-3", 0.0), ("soon", 0.0), ("", 0.0), ("nan", 0.0), ("inf", 0.0)]
)
async def test_the_content_is_the_seconds_that_are_left(tmp_path: Path, content: str, seconds: float) -> None:
    path = tmp_path / "notice"
    async with listening(NoticeFile(str(path), period_s=0.01)) as heard:
        write(path, content)
        await heard.count(1)
    assert seconds - 0.5 < heard.notices[0].deadline_s <= seconds
    assert heard.notices[0].source == "file"


async def test_time_counts_from_the_writing(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    write(path, "100")
    os.utime(path, (time.time() - 60, time.time() - 60))
    async with listening(NoticeFile(str(path), period_s=0.01)) as heard:
        await heard.count(1)
    assert 38.0 < heard.notices[0].deadline_s <= 40.0


async def test_a_file_that_is_taken_away_and_written_again_speaks_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "notice"
    write(path, "100")
    async with listening(NoticeFile(str(path), period_s=0.01)) as heard:
        await heard.count(1)
        path.unlink()
        await heard.until(lambda: "withdrew" in caplog.text)
        write(path, "10")
        await heard.count(2)
    assert [round(one.deadline_s, -1) for one in heard.notices] == [100.0, 10.0]


async def test_a_file_that_cannot_be_read_is_a_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "notice"
    path.mkdir()
    async with listening(NoticeFile(str(path), period_s=0.01)) as heard:
        await heard.until(lambda: "no notices from file" in caplog.text)
        path.rmdir()
        write(path, "5")
        await heard.count(1)
    assert caplog.text.count("no notices from file") == 1
