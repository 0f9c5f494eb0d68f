"""Leases that the holder alone can lose: silence is counted in looks, and a look is taken only by who can hear."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

LOOKS = 10
"""A lease is lost after so many looks without a word."""


class Lease:
    """The lease of one peer: `renew` it with every word, `look` at it from time to time."""

    def __init__(self) -> None:
        self.silent_looks = 0

    def renew(self) -> None:
        """The peer has spoken."""
        self.silent_looks = 0

    def look(self) -> bool:
        """Whether the lease is lost by now."""
        self.silent_looks += 1
        return self.silent_looks >= LOOKS


async def looks(lease_s: float) -> AsyncIterator[int]:
    """Yield 0, 1, 2 … so often that `LOOKS` of them take `lease_s`.

    Whoever was held up, however long, gets one look for that time, after reading what has arrived: a
    lease cannot run out while nobody listens.
    """
    count = 0
    while True:
        await asyncio.sleep(lease_s / LOOKS)
        await asyncio.sleep(0)  # the tasks that read go first
        yield count
        count += 1
