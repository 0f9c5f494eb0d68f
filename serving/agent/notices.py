"""Where notices come from. SIGTERM is handled by the process itself; files are watched here."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_S = 0.1


class NoticeFile:
    """A file whose appearance means that the instance leaves; it holds the seconds that are left."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    async def wait(self) -> float:
        """Seconds left, once the file exists. Unreadable content counts as no time at all."""
        while not self._path.exists():  # noqa: ASYNC110 - files have no events without another library
            await asyncio.sleep(_POLL_S)
        try:
            return max(0.0, float(self._path.read_text().strip()))
        except ValueError:
            logger.warning("%s does not hold a number of seconds; taking it as zero", self._path)
            return 0.0
