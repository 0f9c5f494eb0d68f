"""EC2: interruptions of spot instances and rebalance recommendations, from the instance metadata service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import msgspec

from serving.agent.notices.base import Advice, Notice, Sighting, SourceFailed
from serving.agent.notices.http import Answer, request

URL = "http://169.254.169.254"
PERIOD_S = 5.0  # what Amazon recommends

_TOKEN = "/latest/api/token"
_ACTION = "/latest/meta-data/spot/instance-action"
_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
_TTL = "X-aws-ec2-metadata-token-ttl-seconds"
_TTL_S = 21600  # the longest that is allowed


class _Action(msgspec.Struct):
    action: str
    time: str = ""


class Aws:
    """IMDSv2. The instance leaves whether it is to be terminated, stopped or hibernated."""

    name = "aws"

    def __init__(self, url: str = URL, *, period_s: float = PERIOD_S, timeout_s: float = 2.0) -> None:
        self._url, self.period_s, self._timeout_s = url, period_s, timeout_s
        self._token, self._renew_at = "", 0.0  # loop time

    async def poll(self) -> AsyncIterator[Sighting]:
        """See `Source.poll`: the interruption, then the recommendation."""
        answer = await self._get(_ACTION)
        if answer is not None:
            yield _interruption(answer)
        answer = await self._get(_REBALANCE)
        if answer is not None:
            yield Sighting("the rebalance recommendation", Advice(self.name))

    async def release(self) -> None:
        """Nobody waits for it."""

    async def _get(self, path: str) -> Answer | None:
        """What is at `path`; None if nothing is, which is the rule."""
        answer = await self._ask(path)
        if answer.status == 401:  # the token is of another time, or of another host this instance was on
            self._token = ""
            answer = await self._ask(path)
        if answer.status == 404:
            return None
        if answer.status != 200:
            raise SourceFailed(f"{self._url}{path} answered {answer.status}")
        return answer

    async def _ask(self, path: str) -> Answer:
        token = await self._valid_token()
        headers = {"X-aws-ec2-metadata-token": token}
        return await request("GET", self._url + path, headers=headers, timeout_s=self._timeout_s)

    async def _valid_token(self) -> str:
        now = asyncio.get_running_loop().time()
        if not self._token or now >= self._renew_at:
            answer = await request("PUT", self._url + _TOKEN, headers={_TTL: str(_TTL_S)}, timeout_s=self._timeout_s)
            if answer.status != 200:
                raise SourceFailed(f"{self._url}{_TOKEN} answered {answer.status}")
            self._token = answer.body.decode("latin-1").strip()
            self._renew_at = now + 0.9 * _ttl_s(answer)
        return self._token


def _ttl_s(answer: Answer) -> float:
    given = answer.headers.get(_TTL, "")
    return float(given) if given.isdigit() else _TTL_S


def _interruption(answer: Answer) -> Sighting:
    said = answer.decode(_Action)
    key = f"{said.action} at {said.time}"
    try:
        ends_at = datetime.fromisoformat(said.time)
    except ValueError:  # an end at an unknown time is best taken for an end now
        return Sighting(key, Notice(0.0, Aws.name))
    if ends_at.tzinfo is None:
        ends_at = ends_at.replace(tzinfo=UTC)
    return Sighting(key, Notice(answer.seconds_until(ends_at), Aws.name))
