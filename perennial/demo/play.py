"""The online half of the demo: requests and disturbances of a scenario, played on a fleet and recorded."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

from perennial.fleet import Fleet
from perennial.recording import ActionRecord, EventRecord, StreamRecord
from perennial.scenario import Action, Arrival, Scenario
from serving.api.client import Client
from serving.errors import PerennialError

_SETTLE_S = 60.0
_FINISH_S = 180.0
_AUDIENCE_S = 3.0
_AUDIENCE_TRIES = 100
_AUDIENCE = 2


class Play:
    """One playing of a scenario; the lists grow while it runs, for whoever watches."""

    def __init__(self, fleet: Fleet, scenario: Scenario, reference: dict[str, list[int]]) -> None:
        self._fleet, self._scenario, self._reference = fleet, scenario, reference
        self._began_s, self._began_unix_s = time.monotonic(), time.time()
        self.streams: list[StreamRecord] = []
        self.actions: list[ActionRecord] = []
        self.duration_s = 0.0

    @property
    def now_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began_s

    @property
    def tokens(self) -> int:
        """Tokens delivered so far."""
        return sum(len(stream.tokens) for stream in self.streams)

    @property
    def finished(self) -> int:
        """Streams that have ended."""
        return sum(stream.ended_s is not None for stream in self.streams)

    async def run(self) -> None:
        """Send every request, do every action, and wait for the last token."""
        self._began_s, self._began_unix_s = time.monotonic(), time.time()
        async with self._fleet.client(give_up_s=_FINISH_S) as client:
            requests = [asyncio.create_task(self._request(client, arrival)) for arrival in self._scenario.arrivals]
            try:
                for action in self._scenario.actions:
                    await self._do(action)
                async with asyncio.timeout(_FINISH_S):
                    await asyncio.gather(*requests)
                await self._fleet.wait_serving(timeout_s=_SETTLE_S)
            finally:
                for task in requests:
                    task.cancel()
                await asyncio.gather(*requests, return_exceptions=True)
                self.duration_s = self.now_s

    def events(self) -> list[EventRecord]:
        """The fleet's events on this recording's clock.

        Of what was before, the instances and the last layout stand at its beginning.
        """
        records = [
            EventRecord(time_s=event.time_s - self._began_unix_s, kind=event.kind, data=event.data)
            for event in self._fleet.events
        ]
        before = [record for record in records if record.time_s < 0]
        joined = [record for record in before if record.kind == "instance_joined"]
        layouts = [record for record in before if record.kind == "layout"][-1:]
        start = [EventRecord(time_s=0.0, kind=record.kind, data=record.data) for record in (*joined, *layouts)]
        return start + [record for record in records if record.time_s >= 0]

    async def _request(self, client: Client, arrival: Arrival) -> None:
        await self._sleep_until(arrival.time_s)
        request = arrival.request
        record = StreamRecord(
            request_id=request.request_id,
            submitted_s=self.now_s,
            prompt_tokens=len(request.prompt),
            max_tokens=request.limits.max_tokens,
            temperature=request.sampling.temperature,
            expected=self._reference[request.request_id],
        )
        self.streams.append(record)
        chunks = client.stream(
            request.prompt, request_id=request.request_id, sampling=request.sampling, limits=request.limits
        )
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    count = len(chunk.token_ids)
                    record.positions += range(chunk.output_index, chunk.output_index + count)
                    record.tokens += chunk.token_ids
                    record.times_s += [self.now_s] * count
                    record.finish = chunk.finish or record.finish
        except PerennialError as error:
            record.error = str(error)
        record.ended_s = self.now_s

    async def _do(self, action: Action) -> None:
        """Do one action once the fleet has digested the ones before, so that it means what the scenario says."""
        await self._sleep_until(action.time_s)
        await self._fleet.wait_serving(timeout_s=_SETTLE_S)
        await self._audience()
        await self._fleet.reap()
        candidates = await self._candidates(working=action.kind == "kill")
        name = candidates[action.victim % len(candidates)]
        at_s = self.now_s
        if action.kind == "add":
            name = self._fleet.launch(1)[0]
        elif action.kind == "notice":
            await self._fleet.notice(name, action.grace_s)
        else:
            await self._fleet.kill(name)
        self.actions.append(ActionRecord(time_s=at_s, kind=action.kind, instance=name, grace_s=action.grace_s))

    async def _candidates(self, *, working: bool) -> list[str]:
        """Instances that are not leaving; only those with a position if `working`: killing a spare shows nothing."""
        staying = sorted(item.name for item in self._fleet.instances.values() if not item.leaving)
        info = await self._fleet.info() if working else None
        busy = {position.device.partition("/")[0] for position in info.positions} if info else set()
        return [name for name in staying if name in busy] or staying

    async def _audience(self) -> None:
        """Wait a little for streams under way: a disturbance that nobody could notice shows nothing."""
        for _ in range(_AUDIENCE_TRIES):
            if sum(_under_way(stream) for stream in self.streams) >= _AUDIENCE:
                return
            await asyncio.sleep(_AUDIENCE_S / _AUDIENCE_TRIES)

    async def _sleep_until(self, time_s: float) -> None:
        await asyncio.sleep(max(0.0, time_s - self.now_s))


def _under_way(stream: StreamRecord) -> bool:
    return stream.ended_s is None and 0 < len(stream.tokens) < 0.8 * stream.max_tokens
