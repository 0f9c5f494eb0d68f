"""Compute Engine: preemption of a Spot VM, by a long poll of its metadata server."""

from __future__ import annotations

from collections.abc import AsyncIterator

from serving.agent.notices.base import Notice, Sighting, SourceFailed
from serving.agent.notices.http import Answer, request

URL = "http://metadata.google.internal"
PERIOD_S = 1.0  # between two long polls; only a server that does not hold them makes it matter
HOLD_S = 60

_PREEMPTED = "/computeMetadata/v1/instance/preempted"
_FLAVOR = "Metadata-Flavor"


class Gcp:
    """The metadata server says that the end comes but not when: after `grace_s`, as it was agreed for the VM."""

    name = "gcp"

    def __init__(
        self,
        url: str = URL,
        *,
        grace_s: float,
        period_s: float = PERIOD_S,
        hold_s: int = HOLD_S,
        timeout_s: float = 5.0,
    ) -> None:
        self._url, self._grace_s, self.period_s = url, grace_s, period_s
        self._hold_s, self._timeout_s = hold_s, timeout_s
        self._etag = "0"  # no value has it, so the first poll returns at once

    async def poll(self) -> AsyncIterator[Sighting]:
        """See `Source.poll`: returns at a change, or after `hold_s` seconds without one."""
        said = (await self._get()).body.strip().upper()
        if said not in (b"TRUE", b"FALSE"):
            self._etag = "0"
            raise SourceFailed(f"{self._url}{_PREEMPTED} said neither TRUE nor FALSE but {said[:80]!r}")
        if said == b"TRUE":
            yield Sighting("the preemption", Notice(self._grace_s, self.name))

    async def release(self) -> None:
        """Nobody waits for it."""

    async def _get(self) -> Answer:
        query = f"?wait_for_change=true&timeout_sec={self._hold_s}&last_etag={self._etag}"
        url = self._url + _PREEMPTED
        answer = await request(
            "GET", url + query, headers={_FLAVOR: "Google"}, timeout_s=self._hold_s + self._timeout_s
        )
        if answer.status != 200:
            raise SourceFailed(f"{url} answered {answer.status}")
        if answer.headers.get(_FLAVOR) != "Google":
            raise SourceFailed(f"{url} is not answered by Google's metadata server")
        self._etag = answer.headers.get("ETag", "0")
        return answer
