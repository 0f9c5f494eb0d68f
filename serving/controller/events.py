"""The fleet's log: numbered events, kept for late readers and pushed to live ones."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from data.deployment import Deployment
from serving.controller.dispatch import Replica
from serving.controller.reconfiguration import Outcome
from serving.requests import Event

logger = logging.getLogger(__name__)


_REASONS = ("copied", "uncopied", "unseated")


class EventLog:
    """The latest `kept` events; readers follow at their own pace."""

    def __init__(self, kept: int = 20_000) -> None:
        self._events: deque[Event] = deque(maxlen=kept)
        self._next = 1
        self._changed = asyncio.Event()

    def emit(self, kind: str, **data: object) -> None:
        """Append an event and wake the readers."""
        self._events.append(Event(sequence=self._next, time_s=time.time(), kind=kind, data=data))
        self._next += 1
        logger.info("%s %s", kind, data)
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, since: int) -> AsyncGenerator[Event, None]:
        """Kept events after `since`, then new ones for ever.

        Numbers start again with the controller: a reader who is ahead has read another one's log.
        """
        if since >= self._next:
            since = 0
        while True:
            changed = self._changed
            for event in [event for event in self._events if event.sequence > since]:
                since = event.sequence
                yield event
            if not self._events or self._events[-1].sequence <= since:
                await changed.wait()


def layout_event(
    outcome: Outcome, replicas: Sequence[Replica], target: Deployment, replayed: Sequence[tuple[str, int]]
) -> dict[str, Any]:
    """What a layout event says: who is where, what was moved, and how `replayed` and other requests came through."""
    positions = [
        {"replica": index, "stage": rank // one.config.shards, "shard": rank % one.config.shards, "device": str(device)}
        | ({"model": one.model} if one.model else {})
        for index, one in enumerate(replicas)
        for rank, device in enumerate(one.devices)
    ]
    restored, uncopied = outcome.restored, outcome.uncopied
    return {
        "epoch": outcome.epoch,
        "config": str(target),
        "positions": positions,
        "moved": outcome.moved,
        "seconds": outcome.seconds,
        "requests_moved": len(outcome.heirs) - len(restored),
        "requests_restored": len(restored),
        "requests_replayed": len(replayed),
        "tokens_reexecuted": sorted(tokens for key, tokens in restored.items() if key not in uncopied),
        "tokens_reexecuted_uncopied": sorted(tokens for key, tokens in restored.items() if key in uncopied),
        "tokens_replayed": {why: sorted(n for reason, n in replayed if reason == why) for why in _REASONS},
    }
