"""A service to measure, with its load, and what can be done to it here: change its layout, lose an instance."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks.reconfiguration.load import Load
from benchmarks.reconfiguration.options import Options
from data.layout import Device, ParallelConfig
from data.models import ModelSpec
from perennial.testing import Fleet, fleet, given_plans
from serving.api.client import Client
from serving.engine.weights import read_spec
from serving.requests import Event

Say = Callable[[str], None]
_START_S = 240.0
_SETTLE_S = 120.0
_CHANGE_S = 30.0
_EXPLAIN_S = 0.5
_COPY_BYTES_PER_S = 1.5e9


@dataclass(frozen=True, slots=True)
class Bench:
    """What every case works with: options, the checkpoint, its geometry, and a voice."""

    options: Options
    checkpoint: str
    spec: ModelSpec
    say: Say

    @classmethod
    def of(cls, options: Options, checkpoint: str, say: Say) -> Bench:
        """The bench of a checkpoint."""
        return cls(options, checkpoint, read_spec(checkpoint), say)

    def plans(self, layouts: Mapping[int, str], batch: int) -> Any:
        """A plan book that says what to run with so many instances."""
        return given_plans(self.spec, layouts, max_batch=batch, instance_type=self.options.instance_type)


@dataclass(slots=True)
class Stage:
    """A running service under load. `offset_s` is Unix time minus `time.monotonic`."""

    bench: Bench
    service: Fleet
    client: Client
    load: Load
    batch: int
    offset_s: float
    _books: int = 0

    async def adopt(self, layouts: Mapping[int, str]) -> None:
        """Serve by another plan book from now on."""
        self._books += 1
        path = self.service.home / f"plan-{self._books}.json"
        path.write_bytes(self.bench.plans(layouts, self.batch).to_bytes())
        await self.client.reload_plan(str(path))

    async def change(self, instances: int, layout: str) -> Sequence[Event]:
        """Go to another layout; returns the events of the change, `layout` being the last."""
        first = len(self.service.events)
        await self.adopt({instances: layout})
        wanted = str(config(layout, self.batch))
        await self.service.wait_event(
            lambda event: event.kind == "layout" and event.data["config"] == wanted, since=first, timeout_s=_CHANGE_S
        )
        events = self.service.events[first:]
        last = max(index for index, event in enumerate(events) if event.kind == "layout")
        return events[: last + 1]

    async def settle(self) -> None:
        """Wait until the fleet has come to rest."""
        await self.service.wait_serving(timeout_s=_SETTLE_S)

    async def watch(self, seconds: float) -> tuple[float, float]:
        """Let the service run undisturbed; returns the interval."""
        since = time.monotonic()
        await asyncio.sleep(seconds)
        return since, time.monotonic()

    async def devices(self) -> list[Device]:
        """Devices that plans may use now, in the order in which the controller sees them."""
        info = await self.service.info()
        ready = [one.instance for one in info.instances if one.state == "ready"] if info else []
        return [Device(name, 0) for name in sorted(ready)]


@asynccontextmanager
async def stage(
    bench: Bench,
    name: str,
    *,
    instances: int,
    layouts: Mapping[int, str],
    requests: int,
    batch: int,
    prompt_tokens: int = 0,
    max_tokens: int = 0,
    engine: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Stage]:
    """Start instances and clients; ends everything. Lengths that are 0 are those of the options.

    Raises what `fleet` raises, and `TimeoutError`.
    """
    options = bench.options
    home = options.out / "logs" / name
    shutil.rmtree(home, ignore_errors=True)
    gpus = range(options.gpus) if options.device == "cuda" else ()
    prompt_tokens, max_tokens = prompt_tokens or options.context, max_tokens or options.max_tokens
    began = time.monotonic()
    async with fleet(
        bench.checkpoint,
        instances=instances,
        plan=bench.plans(layouts, batch),
        home=home,
        instance_type=options.instance_type,
        start_timeout_s=_START_S,
        gpus=tuple(gpus),
        expected_instances=instances,
        engine=options.engine(bench.spec, batch, prompt_tokens + max_tokens, **(engine or {})),
        timeouts=options.timeouts(),
        **settings,
    ) as service:
        bench.say(f"{name}: {instances} instances serve after {time.monotonic() - began:.1f} s")
        client = service.client()
        try:
            lengths = {"prompt_tokens": prompt_tokens, "max_tokens": max_tokens}
            async with Load(client, requests=requests, vocab=bench.spec.vocab, **lengths) as load:
                await load.start(timeout_s=_START_S)
                bench.say(f"{name}: {requests} requests run after {time.monotonic() - began:.1f} s")
                yield Stage(bench, service, client, load, batch, time.time() - time.monotonic())
        except BaseException:
            await _ask_why(service)
            raise
        finally:
            await client.close()
            (home / "events.json").write_bytes(msgspec.json.encode(service.events))
    _drop_journal(home)


async def _ask_why(service: Fleet) -> None:
    """Every process writes to its log where it stands."""
    for process in service.alive():
        with contextlib.suppress(psutil.Error):  # it may end meanwhile
            if any(argument.startswith("serving.") for argument in process.cmdline()):
                process.send_signal(signal.SIGUSR1)
    await asyncio.sleep(_EXPLAIN_S)


def last_words(folder: Path, lines: int) -> dict[str, list[str]]:
    """The ends of the logs that say something: the machine that has them may be gone when they are wanted."""
    logs = {path: path.read_text(encoding="utf-8", errors="replace").splitlines() for path in folder.rglob("*.log")}
    return {str(path.relative_to(folder)): text[-lines:] for path, text in sorted(logs.items()) if text}


def _drop_journal(home: Path) -> None:
    for path in home.glob("journal.sqlite*"):
        path.unlink()


def copies_s(bench: Bench, requests: int, context: int) -> float:
    """How long to wait until the KV of long prompts is copied: what is measured is the state that lasts."""
    spec = bench.spec
    return requests * context * spec.kv_token_bytes / _COPY_BYTES_PER_S


def config(layout: str, batch: int) -> ParallelConfig:
    """The configuration that `replicas x stages x shards` stands for."""
    replicas, stages, shards = (int(degree) for degree in layout.split("x"))
    return ParallelConfig(replicas, stages, shards, batch)
