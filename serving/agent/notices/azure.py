"""Azure: evictions of spot VMs, from Scheduled Events, and the answer that lets them go ahead."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from email.utils import parsedate_to_datetime

import msgspec

from serving.agent.notices.base import Notice, Sighting, SourceFailed
from serving.agent.notices.http import Answer, request

URL = "http://169.254.169.254"
PERIOD_S = 1.0  # what Microsoft recommends

_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_ENDS = ("Preempt", "Terminate")
_ENABLING_S = 120.0  # the first request of a VM switches the service on, and is answered after that


class _Event(msgspec.Struct, frozen=True, rename="pascal"):
    event_id: str
    event_type: str = ""
    event_status: str = ""
    not_before: str | None = ""
    resources: tuple[str, ...] = ()


class _Document(msgspec.Struct, rename="pascal"):
    events: tuple[_Event, ...] = ()


class Azure:
    """Scheduled Events 2020-07-01. Events of a whole scale set arrive; those of this VM count."""

    name = "azure"

    def __init__(
        self,
        url: str = URL,
        *,
        period_s: float = PERIOD_S,
        timeout_s: float = 5.0,
        enabling_s: float = _ENABLING_S,
    ) -> None:
        self._url, self.period_s, self._timeout_s = url, period_s, timeout_s
        self._enabling_s = enabling_s  # until the first answer, on top of the timeout
        self._vm = ""
        self._mine: list[_Event] = []

    async def poll(self) -> AsyncIterator[Sighting]:
        """See `Source.poll`: evictions and terminations of this VM."""
        self._vm = self._vm or (await self._get(_NAME, self._timeout_s)).body.decode().strip().lower()
        answer = await self._get(_EVENTS, self._timeout_s + self._enabling_s)
        self._enabling_s = 0.0
        self._mine = [event for event in answer.decode(_Document).events if self._concerns(event)]
        for event in self._mine:
            key = f"{event.event_type} {event.event_id} {event.not_before or 'now'}"
            yield Sighting(key, Notice(_seconds_left(event, answer), self.name))

    async def release(self) -> None:
        """Acknowledge the events in force, so that Azure need not wait for their time.

        An event that concerns other VMs too is left alone: to acknowledge it would end them as well.
        """
        ours = [event for event in self._mine if len(event.resources) == 1 and event.event_status != "Started"]
        for event in ours:
            body = msgspec.json.encode({"StartRequests": [{"EventId": event.event_id}]})
            await self._ask("POST", _EVENTS, self._timeout_s, body)

    def _concerns(self, event: _Event) -> bool:
        return event.event_type in _ENDS and self._vm in (name.lower() for name in event.resources)

    async def _get(self, path: str, timeout_s: float) -> Answer:
        return await self._ask("GET", path, timeout_s)

    async def _ask(self, method: str, path: str, timeout_s: float, body: bytes = b"") -> Answer:
        headers = {"Metadata": "true"} | ({"Content-Type": "application/json"} if body else {})
        answer = await request(method, self._url + path, headers=headers, timeout_s=timeout_s, body=body)
        if answer.status != 200:
            raise SourceFailed(f"{self._url}{path} answered {answer.status}")
        return answer


def _seconds_left(event: _Event, answer: Answer) -> float:
    """Until `NotBefore`, which is empty once the event has begun; an unreadable time is no time."""
    try:
        not_before: datetime = parsedate_to_datetime(event.not_before or "")
        return answer.seconds_until(not_before)
    except (ValueError, TypeError):
        return 0.0
