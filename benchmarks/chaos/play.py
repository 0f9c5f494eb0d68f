"""Playing a chaos script on a real fleet."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.chaos.script import Disturbance, Script
from perennial.comparison import Difference, compare, indexed
from perennial.fleet import Fleet
from perennial.processes import living
from perennial.scenario import random_sampling
from perennial.testing import Leftovers, fleet, given_plans
from serving.engine.weights import read_spec
from serving.errors import PerennialError
from serving.requests import GenerationRequest, Limits
from serving.settings import EngineSettings, Timeouts

MODEL = {"family": "llama", "layers": 6, "hidden": 64, "heads": 8, "kv_heads": 4, "ffn": 128, "max_positions": 1024}
_TIMEOUTS = Timeouts(lease_s=2.0, collective_s=5.0, pause_s=5.0, prepare_s=20.0, switch_s=10.0)
_MOMENT_S = 1.5  # how long to wait for an event that may never come
_FINISH_S = 180.0
_FULL = 4


@dataclass(slots=True)
class Outcome:
    """What became of one script."""

    seed: int
    difference: Difference = field(default_factory=Difference)
    streams: int = 0
    cancelled: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    layouts: int = 0
    recoveries: int = 0
    seconds: float = 0.0
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Nothing lost, duplicated, mismatched, failed or left behind."""
        return not self.difference and not self.errors


def request_pool(count: int) -> list[GenerationRequest]:
    """The requests that all scripts choose from; half greedy, half sampled, prompts of up to three steps."""
    source = random.Random(20_26)
    return [
        GenerationRequest(
            request_id=f"p{index}",
            prompt=tuple(source.randrange(8, 512) for _ in range(source.choice((3, 20, 90, 300, 600)))),
            sampling=random_sampling(source),
            limits=Limits(max_tokens=source.choice((20, 80, 160, 260)), ignore_eos=source.random() < 0.8),
            resumable=True,
        )
        for index in range(count)
    ]


async def play(
    script: Script, checkpoint: str, pool: Sequence[GenerationRequest], reference: dict[str, list[int]], home: Path
) -> Outcome:
    """Run a script to its end and judge every stream."""
    outcome, began = Outcome(script.seed), time.monotonic()
    plan = given_plans(read_spec(checkpoint), script.layouts)
    engine = EngineSettings(kv_blocks=script.kv_blocks)
    events: list[Any] = []
    try:
        async with fleet(
            checkpoint, instances=script.instances, plan=plan, home=home, timeouts=_TIMEOUTS, engine=engine
        ) as service:
            events = service.events
            await _Run(script, service, pool, reference, outcome).play()
    except Leftovers as error:
        outcome.errors.append(str(error))
    except (PerennialError, TimeoutError, OSError) as error:
        outcome.errors.append(f"{type(error).__name__}: {error}")
    outcome.seconds = time.monotonic() - began
    outcome.events = [msgspec.to_builtins(event) for event in events]
    in_force = [event for event in events if event.kind == "layout"]
    outcome.layouts = len(in_force)
    outcome.recoveries = sum(event.data.get("mode") == "recovery" for event in in_force)
    return outcome


class _Run:
    def __init__(
        self,
        script: Script,
        service: Fleet,
        pool: Sequence[GenerationRequest],
        reference: dict[str, list[int]],
        outcome: Outcome,
    ) -> None:
        self._script, self._service, self._pool = script, service, pool
        self._reference, self._outcome = reference, outcome
        self._background: list[asyncio.Task[None]] = []
        self._prefilling = asyncio.Event()

    async def play(self) -> None:
        client = self._service.client(give_up_s=_FINISH_S)
        try:
            streams = [asyncio.create_task(self._stream(client, *item)) for item in self._script.requests]
            for item in self._script.disturbances:
                await self._wait_for(item)
                await self._do(item)
            await asyncio.gather(*self._background)
            await self._restore()
            _, unfinished = await asyncio.wait(streams, timeout=_FINISH_S)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            if unfinished:
                self._outcome.errors.append(f"{len(unfinished)} streams did not end within {_FINISH_S:g} s")
            await self._stream(client, 0.0, 0, None, probe=True)
        finally:
            await client.close()

    # -- requests -------------------------------------------------------------------------------

    async def _stream(
        self, client: Any, at_s: float, index: int, cancel_after: int | None, *, probe: bool = False
    ) -> None:
        await asyncio.sleep(at_s)
        template = self._pool[index]
        request_id = f"s{self._script.seed}-{'probe' if probe else template.request_id}"
        delivered: list[tuple[int, int]] = []
        finished = False
        self._prefilling.set()
        options = {"sampling": template.sampling, "limits": template.limits, "request_id": request_id}
        try:
            async with asyncio.timeout(_FINISH_S), aclosing(client.stream(template.prompt, **options)) as chunks:
                async for chunk in chunks:
                    delivered += indexed([chunk])
                    finished = chunk.finish is not None
                    if cancel_after is not None and len(delivered) >= cancel_after and not finished:
                        break
        except (PerennialError, TimeoutError) as error:
            self._outcome.errors.append(f"{request_id} after {len(delivered)} tokens: {type(error).__name__}: {error}")
        self._judge(request_id, self._reference[template.request_id], delivered, finished, cancel_after)

    def _judge(
        self,
        request_id: str,
        expected: list[int],
        delivered: list[tuple[int, int]],
        finished: bool,
        cancel_after: int | None,
    ) -> None:
        difference = compare(expected, delivered, finished=finished or cancel_after is None)
        outcome = self._outcome
        outcome.difference += difference
        outcome.streams += 1
        outcome.tokens += len(delivered)
        outcome.cancelled += not finished
        if difference:
            outcome.wrong.append(f"{request_id}: {difference}; got {delivered[-3:]}, {len(expected)} expected")

    # -- disturbances ---------------------------------------------------------------------------

    async def _wait_for(self, item: Disturbance) -> None:
        if item.moment == "prefill":
            self._prefilling.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._prefilling.wait(), _MOMENT_S)
        elif item.moment != "delay":
            with contextlib.suppress(TimeoutError):
                await self._service.wait_event(
                    lambda event: event.kind == item.moment, since=len(self._service.events), timeout_s=_MOMENT_S
                )
        await asyncio.sleep(item.after_s)

    async def _do(self, item: Disturbance) -> None:
        live = self._live()
        victim = live[item.victim % len(live)] if live else ""
        if not victim and item.kind not in ("add", "controller", "blackout"):
            return
        self._outcome.done.append(
            f"{item.kind} {victim}".strip() if item.kind not in ("add", "controller") else item.kind
        )
        if item.kind == "notice":
            await self._service.notice(victim, item.seconds)
        elif item.kind == "kill":
            await self._service.kill(victim)
        elif item.kind == "kill_worker":
            self._kill_worker(victim)
        elif item.kind == "suspend":
            self._service.suspend(victim)
            self._background.append(asyncio.create_task(self._resume(victim, item.seconds)))
        elif item.kind == "add":
            self._service.launch(min(item.count, _FULL - len(live)))
        elif item.kind == "controller":
            await self._service.kill_controller()
            await asyncio.sleep(item.seconds)
            await self._service.restart_controller()
        else:
            await self._black_out(item)

    async def _black_out(self, item: Disturbance) -> None:
        for name in list(self._service.instances):
            await self._service.kill(name)
        await asyncio.sleep(item.seconds)
        self._service.launch(item.count)

    async def _resume(self, name: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        if name in self._service.instances:
            self._service.resume(name)

    def _kill_worker(self, name: str) -> None:
        group = self._service.instances[name].group
        for process in living([group.pid]):
            if process.pid != group.pid:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
                return

    def _live(self) -> list[str]:
        instances = self._service.instances.values()
        return sorted(item.name for item in instances if item.group.alive and not item.leaving and not item.suspended)

    async def _restore(self) -> None:
        """Bring the fleet to two instances at least, so that everything can end."""
        missing = 2 - len(self._live())
        if missing > 0:
            self._service.launch(missing)
            self._outcome.done.append(f"add {missing} at the end")


def record(script: Script, outcome: Outcome) -> dict[str, Any]:
    """Script and outcome as JSON values; events only of a run that did not hold."""
    return {
        "script": asdict(script),
        "outcome": {**asdict(outcome), "events": [] if outcome.held else outcome.events, "held": outcome.held},
    }
