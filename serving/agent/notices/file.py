"""A file whose appearance means that the instance leaves: for preStop hooks, scripts and tests."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator
from pathlib import Path

from serving.agent.notices.base import Notice, Sighting

logger = logging.getLogger(__name__)


class NoticeFile:
    """The file holds the seconds that are left, counted from when it was written."""

    name = "file"

    def __init__(self, path: str, *, period_s: float = 0.1) -> None:
        self._path, self.period_s = Path(path), period_s

    async def poll(self) -> AsyncIterator[Sighting]:
        """See `Source.poll`. Unreadable content counts as no time at all."""
        try:
            written_at, content = self._path.stat().st_mtime, self._path.read_text().strip()
        except FileNotFoundError:
            return
        key = f"{self._path} of {written_at}: {content}"
        yield Sighting(key, Notice(_seconds_left(content, time.time() - written_at), self.name))

    async def release(self) -> None:
        """Nobody waits for it."""


def _seconds_left(content: str, age_s: float) -> float:
    try:
        left_s = float(content)
    except ValueError:
        left_s = math.nan
    if not math.isfinite(left_s):
        logger.warning("a notice file holds %r, which is not a number of seconds; taking it as zero", content[:80])
        return 0.0
    return max(0.0, left_s - max(0.0, age_s))
