"""Many reconfigurations in a row under load, and whether anything grows: memory, descriptors, threads.

`python -m benchmarks.leaks --reconfigurations 500 --out DIR`
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from benchmarks.growth import Sample, Trend, trends
from perennial.comparison import Difference, compare, indexed
from perennial.reference import reference_streams
from perennial.scenario import Shape, scenario
from perennial.testing import Fleet, fleet, given_plans
from profiling.fingerprint import this_machine
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec
from serving.requests import GenerationRequest
from serving.settings import Capacity, Timeouts

MODEL = {"family": "llama", "layers": 4, "hidden": 64, "heads": 8, "kv_heads": 4, "ffn": 128, "max_positions": 512}
_LAYOUTS = ("1x1x2", "1x2x1", "2x1x1")
_INSTANCES = 2
_STREAMS = 4  # at any time
_LEAST_SAMPLES = 10
_FINISHED_KEPT = 16  # what is kept on purpose reaches its bound in the warm-up
_SHAPE = Shape(requests=24, prompt_tokens=(4, 60), output_tokens=(40, 120))
_CHANGE_S = 60.0
_QUIET_S = 1.0  # threads and groups of the layout before are let go in the background
_FINISH_S = 60.0


@dataclass(slots=True)
class Load:
    """Streams that never cease, each held against the undisturbed run."""

    requests: Sequence[GenerationRequest]
    reference: dict[str, list[int]]
    difference: Difference = field(default_factory=Difference)
    streams: int = 0
    tokens: int = 0
    ending: bool = False

    async def keep(self, client: Any, lane: int) -> None:
        """One stream after the other until `ending`."""
        turn = 0
        while not self.ending:
            request = self.requests[(lane + turn * _STREAMS) % len(self.requests)]
            await self._one(client, request, f"leaks-{lane}-{turn}")
            turn += 1

    async def _one(self, client: Any, request: GenerationRequest, request_id: str) -> None:
        delivered: list[tuple[int, int]] = []
        options = {"sampling": request.sampling, "limits": request.limits, "request_id": request_id}
        async with aclosing(client.stream(request.prompt, **options)) as chunks:
            async for chunk in chunks:
                delivered += indexed([chunk])
        self.difference += compare(self.reference[request.request_id], delivered)
        self.streams += 1
        self.tokens += len(delivered)


def main() -> int:
    """Reconfigure and measure; 0 if nothing grew and no token was lost."""
    parser = argparse.ArgumentParser(prog="benchmarks.leaks", description=__doc__)
    parser.add_argument("--reconfigurations", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of all layouts between two samples")
    parser.add_argument("--out", type=Path, required=True, help="folder for leaks.json")
    arguments = parser.parse_args()
    every = arguments.rounds * len(_LAYOUTS)  # so that all samples are taken in the same layout
    if arguments.reconfigurations // every < _LEAST_SAMPLES:
        parser.error(f"a slope needs at least {_LEAST_SAMPLES} samples; lower --rounds")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="perennial-leaks-") as folder:
        result = asyncio.run(_run(arguments.reconfigurations, every, Path(folder)))
    (arguments.out / "leaks.json").write_text(json.dumps(result, indent=1) + "\n")
    Console().print(result["verdict"])
    return 0 if result["verdict"]["flat"] and not result["verdict"]["difference"] else 1


async def _run(count: int, every: int, folder: Path) -> dict[str, Any]:
    checkpoint = str(folder / "model")
    create_checkpoint(checkpoint, **MODEL)  # type: ignore[arg-type]
    requests = [arrival.request for arrival in scenario(7, _SHAPE).arrivals]
    load, began = Load(requests, reference_streams(checkpoint, requests)), time.monotonic()
    books = [folder / f"{layout}.json" for layout in _LAYOUTS]
    for layout, book in zip(_LAYOUTS, books, strict=True):
        book.write_bytes(given_plans(read_spec(checkpoint), {_INSTANCES: layout}).to_bytes())
    async with fleet(
        checkpoint,
        instances=_INSTANCES,
        plan=books[0],
        home=folder / "fleet",
        timeouts=Timeouts(settle_s=0.0),
        capacity=Capacity(finished_kept=_FINISHED_KEPT),
    ) as service:
        client = service.client()
        try:
            lanes = [asyncio.create_task(load.keep(client, lane)) for lane in range(_STREAMS)]
            samples = await _reconfigure(service, books, count, every, lanes)
            load.ending = True
            await asyncio.wait_for(asyncio.gather(*lanes), _FINISH_S)
        finally:
            await client.close()
        failed = sum(event.kind == "reconfiguration_failed" for event in service.events)
    found = trends(samples)
    return {
        "machine": this_machine().to_json(),
        "verdict": _verdict(found, load, failed, time.monotonic() - began),
        "trends": [asdict(trend) | {"flat": trend.flat} for trend in found],
        "samples": [asdict(sample) for sample in samples],
    }


def _verdict(found: Sequence[Trend], load: Load, failed: int, seconds: float) -> dict[str, Any]:
    return {
        "flat": all(trend.flat for trend in found),
        "growing": [str(trend) for trend in found if not trend.flat],
        "difference": asdict(load.difference) if load.difference else {},
        "streams": load.streams,
        "tokens": load.tokens,
        "reconfigurations_failed": failed,
        "seconds": round(seconds, 1),
    }


async def _reconfigure(
    service: Fleet, books: Sequence[Path], count: int, every: int, lanes: Sequence[asyncio.Task[None]]
) -> list[Sample]:
    console, began = Console(), time.monotonic()
    samples: list[Sample] = []
    async with service.client() as control:
        for done in range(1, count + 1):
            since = len(service.events)
            await control.reload_plan(str(books[done % len(books)]))
            await service.wait_event(lambda event: event.kind == "layout", since=since, timeout_s=_CHANGE_S)
            for lane in lanes:
                if lane.done():
                    lane.result()  # a stream failed: say so at once
            if done % every == 0:
                await asyncio.sleep(_QUIET_S)
                samples += (now := sample(service, done))
                sizes = " ".join(f"{one.process} {one.uss_bytes >> 20}M/{one.descriptors}/{one.threads}" for one in now)
                console.print(f"{done}/{count} after {time.monotonic() - began:.0f} s: {sizes}", soft_wrap=True)
    return samples


def sample(service: Fleet, reconfigurations: int) -> list[Sample]:
    """What every process of the fleet holds now."""
    groups = {service.controller.pid: "controller"} if service.controller is not None else {}
    groups |= {item.group.pid: item.name for item in service.instances.values()}
    taken = []
    for process in service.alive():
        with process.oneshot():
            leader = process.pid in groups
            name = groups.get(process.pid) or f"{_name_of(process.parent(), groups)}/worker"
            taken.append(
                Sample(
                    reconfigurations,
                    name if name == "controller" or not leader else f"{name}/agent",
                    int(process.memory_full_info().uss),
                    process.num_fds(),
                    process.num_threads(),
                )
            )
    return sorted(taken, key=lambda one: one.process)


def _name_of(process: psutil.Process | None, groups: dict[int, str]) -> str:
    return groups.get(process.pid, "?") if process is not None else "?"


if __name__ == "__main__":
    sys.exit(main())
