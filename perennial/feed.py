"""The events of a service, followed over every restart of its controller."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from serving.api.client import Client
from serving.errors import Retryable, TransportError
from serving.requests import Event

_RECONNECT_S = 0.1
_CHANGES = ("reconfiguration_started", "reconfiguration_failed", "layout")


class EventFeed:
    """Gathers events, each once, and wakes those who wait for one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Condition()

    async def collect(self, client: Client) -> None:
        """Follow the service until cancelled. A new controller counts its events from the start again."""
        seen: set[tuple[int, float]] = set()
        while True:
            with contextlib.suppress(Retryable, TransportError):
                async for event in client.watch_events():
                    if (event.sequence, event.time_s) not in seen:
                        seen.add((event.sequence, event.time_s))
                        await self._note(event)
            await asyncio.sleep(_RECONNECT_S)

    async def wait(self, accept: Callable[[Event], bool], *, since: int, timeout_s: float) -> Event:
        """The first event from list position `since` on that `accept` likes. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s), self._changed:
            while True:
                for event in self.events[since:]:
                    if accept(event):
                        return event
                since = len(self.events)
                await self._changed.wait()

    @property
    def settled(self) -> bool:
        """Whether the last change of layout that was begun has come to an end."""
        kinds = [event.kind for event in self.events if event.kind in _CHANGES]
        return bool(kinds) and kinds[-1] != "reconfiguration_started"

    async def _note(self, event: Event) -> None:
        async with self._changed:
            self.events.append(event)
            self._changed.notify_all()
