"""Playing a chaos script on a real fleet."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.chaos.outcome import MOST_REEXECUTED, Outcome, recovered
from benchmarks.chaos.script import Script
from benchmarks.chaos.strikes import Strikes
from data.plan import PlanBook
from perennial.comparison import compare, indexed
from perennial.fleet import Fleet
from perennial.processes import Start, start_command
from perennial.scenario import random_sampling
from perennial.testing import fleet, given_plans
from serving.engine.weights import read_spec
from serving.errors import PerennialError
from serving.requests import GenerationRequest, Limits
from serving.settings import EngineSettings, ServingSettings, Timeouts

_POSITIONS = 1024
MODEL = {"family": "llama", "layers": 6, "hidden": 64, "heads": 8, "kv_heads": 4, "ffn": 128}
MODEL["max_positions"] = _POSITIONS
_TIMEOUTS = Timeouts(lease_s=2.0, collective_s=5.0, pause_s=5.0, prepare_s=20.0, switch_s=10.0, regather_s=1.5)
_FINISH_S = 180.0
_FIRST_PORT, _PORT_SLOTS = 12_000, 6000  # below those that connections take: a controller returns to its own
_PROMPTS = (3, 20, 90, 300, 600)
_LONG_PROMPTS = (3, 40, 120, 300, 880)
_ANSWERS = (20, 80, 160, 260)
_SHORTER_ANSWERS = (20, 50, 90, 140)


def request_pool(count: int, *, hard: bool = False) -> list[GenerationRequest]:
    """The requests that all scripts choose from; half greedy, half sampled, prompts of up to three steps.

    Hard ones have prompts of up to four steps, which with their answers nearly fill the model's context.
    """
    source = random.Random(20_27 if hard else 20_26)
    drawn = []
    for index in range(count):
        size = source.choice(_LONG_PROMPTS if hard else _PROMPTS)
        prompt = tuple(source.randrange(8, 512) for _ in range(size))
        sampling, most = random_sampling(source), source.choice(_SHORTER_ANSWERS if hard else _ANSWERS)
        limits = Limits(max_tokens=min(most, _POSITIONS - size), ignore_eos=source.random() < 0.8)
        drawn.append(
            GenerationRequest(request_id=f"p{index}", prompt=prompt, sampling=sampling, limits=limits, resumable=True)
        )
    return drawn


@dataclass(frozen=True, slots=True)
class Stage:
    """What all runs share: the model, the requests and their undisturbed streams, and how processes start."""

    checkpoint: str
    pool: Sequence[GenerationRequest]
    reference: Mapping[str, list[int]]
    start: Start = start_command
    replication: bool = True


def replication_settings(*, enabled: bool) -> dict[str, Any]:
    """The serving tier's switch for replication, if it has one."""
    kinds = {one.name: one.type for one in msgspec.structs.fields(ServingSettings)}
    return {"replication": kinds["replication"](enabled=enabled)} if "replication" in kinds else {}


async def play(script: Script, stage: Stage, home: Path) -> Outcome:
    """Run a script to its end and judge every stream."""
    outcome, began = Outcome(script.seed), time.monotonic()
    events: list[Any] = []
    books = _books(script, stage.checkpoint)
    settings: dict[str, Any] = _ports(script.seed) | replication_settings(enabled=stage.replication)
    try:
        async with fleet(
            stage.checkpoint,
            instances=script.instances,
            devices_per_instance=script.devices_per_instance,
            plan=books[0],
            home=home,
            start=stage.start,
            timeouts=_TIMEOUTS,
            engine=EngineSettings(kv_blocks=script.kv_blocks),
            **settings,
        ) as service:
            events = service.events
            await _Run(script, service, stage, outcome, _write(books, home)).play()
    except Exception as error:  # noqa: BLE001 - this seed failed; the others go on
        outcome.errors.append(f"{type(error).__name__}: {error}")
    outcome.seconds = time.monotonic() - began
    outcome.events = [msgspec.to_builtins(event) for event in events]
    _note_layouts(outcome, events, replication=stage.replication)
    return outcome


def _books(script: Script, checkpoint: str) -> list[PlanBook]:
    spec, devices = read_spec(checkpoint), script.devices_per_instance
    layouts = [script.layouts, *([script.other_layouts] if script.other_layouts else [])]
    return [given_plans(spec, one, devices_per_instance=devices) for one in layouts]


def _write(books: Sequence[PlanBook], home: Path) -> list[Path]:
    paths = [home / f"book-{index}.json" for index in range(len(books))]
    for path, book in zip(paths, books, strict=True):
        path.write_bytes(book.to_bytes())
    return paths


def _ports(seed: int) -> dict[str, Any]:
    """Three free ports for the controller of a seed; another seed's are others."""
    for step in range(_PORT_SLOTS):
        first = _FIRST_PORT + 3 * ((seed + 97 * step) % _PORT_SLOTS)
        if all(_is_free(first + offset) for offset in range(3)):
            return {"grpc_port": first, "control_port": first + 1, "metrics_port": first + 2}
    return {}


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _note_layouts(outcome: Outcome, events: Sequence[Any], *, replication: bool) -> None:
    in_force = [event for event in events if event.kind == "layout"]
    outcome.layouts = len(in_force)
    outcome.recoveries = sum(event.data.get("mode") == "recovery" for event in in_force)
    outcome.recovered = recovered(events)
    again = outcome.recovered["most_reexecuted"]
    if replication and again > MOST_REEXECUTED:
        outcome.errors.append(f"{again} tokens of a request were computed again although it had a copy")


class _Run:
    def __init__(self, script: Script, service: Fleet, stage: Stage, outcome: Outcome, books: Sequence[Path]) -> None:
        self._script, self._service, self._stage, self._outcome = script, service, stage, outcome
        most = max(script.layouts)
        self._strikes = Strikes(script, service, Path(service.home), outcome.done, most, books)

    async def play(self) -> None:
        client = self._service.client(give_up_s=_FINISH_S)
        try:
            streams = [asyncio.create_task(self._stream(client, *item)) for item in self._script.requests]
            await self._strikes.all()
            _, unfinished = await asyncio.wait(streams, timeout=_FINISH_S)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            if unfinished:
                self._outcome.errors.append(f"{len(unfinished)} streams did not end within {_FINISH_S:g} s")
            await self._stream(client, 0.0, 0, None, probe=True)
        finally:
            await client.close()

    async def _stream(
        self, client: Any, at_s: float, index: int, cancel_after: int | None, *, probe: bool = False
    ) -> None:
        await asyncio.sleep(at_s)
        template = self._stage.pool[index]
        request_id = f"s{self._script.seed}-{'probe' if probe else template.request_id}"
        delivered: list[tuple[int, int]] = []
        finished = False
        self._strikes.prefilling.set()
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
        self._judge(request_id, self._stage.reference[template.request_id], delivered, finished, cancel_after)

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
