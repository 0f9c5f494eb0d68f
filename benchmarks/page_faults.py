"""What it costs if workers give memory back that the next step needs again: tokens per second and page faults.

`python -m benchmarks.page_faults --out DIR`

Two workers serve a closed loop with the allocator's settings of `serving.agent.environment`, and with the trim
threshold that glibc keeps as soon as another of its thresholds is set (128 KiB); in the order patient, hasty,
hasty, patient, each time in processes of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

from benchmarks.fidelity.clients import Clients, Stream
from perennial.demo.setting import CPU
from perennial.testing import fleet, given_plans
from profiling.fingerprint import this_machine
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec
from serving.settings import EngineSettings

_SETTING, _HASTY = "MALLOC_TRIM_THRESHOLD_", str(128 << 10)
_ORDER = ("patient", "hasty", "hasty", "patient")
_WORKERS, _CLIENTS, _BATCH = 2, 4, 8
_PROMPT, _OUTPUT = 100, 16
_WARM_S, _LEAST_S = 5.0, 1.0
_GIVE_UP_S = 60.0


@dataclass(frozen=True, slots=True)
class Served:
    """What one fleet did: `system_share` is the part of the workers' processor time that the system used."""

    allocator: str
    tokens_per_s: float
    faults_per_token: float
    system_share: float


def main(arguments: list[str] | None = None) -> int:
    """Measure and write `page_faults.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page_faults", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each of the four fleets")
    options = parser.parse_args(arguments)
    if options.seconds < _LEAST_S:
        parser.error(f"--seconds {options.seconds:g} says nothing; choose at least {_LEAST_S:g}")
    found = []
    for allocator in _ORDER:
        found.append(asyncio.run(_served(allocator, options.seconds)))
        print(found[-1], flush=True)
    results = _summary(found) | {"machine": this_machine().to_json()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "page_faults.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"patient workers make {results['faster']:.2f} times as many tokens per second")
    return 0


def _summary(found: Sequence[Served]) -> dict[str, Any]:
    rates = {name: fmean(one.tokens_per_s for one in found if one.allocator == name) for name in set(_ORDER)}
    return {"faster": round(rates["patient"] / rates["hasty"], 3), "fleets": [asdict(one) for one in found]}


async def _served(allocator: str, seconds: float) -> Served:
    """One fleet. Its workers inherit this process's environment, which goes before what they would be given."""
    os.environ.pop(_SETTING, None)
    if allocator == "hasty":
        os.environ[_SETTING] = _HASTY
    with tempfile.TemporaryDirectory(prefix="perennial-page-faults-") as folder:
        checkpoint = f"{folder}/model"
        create_checkpoint(checkpoint, seed=0, **CPU.model)
        spec = read_spec(checkpoint)
        plan = given_plans(spec, {_WORKERS: f"{_WORKERS}x1x1"}, max_batch=_BATCH)
        engine = EngineSettings(kv_memory_bytes=8_000_000)
        async with (
            fleet(checkpoint, instances=_WORKERS, plan=plan, home=f"{folder}/fleet", engine=engine) as service,
            service.client(give_up_s=_GIVE_UP_S) as client,
        ):
            return await _loop(allocator, Clients(client, spec.vocab, seed=0), seconds)


async def _loop(allocator: str, clients: Clients, seconds: float) -> Served:
    streams, end_s = list[Stream](), time.monotonic() + _WARM_S + seconds

    async def keep() -> None:
        while time.monotonic() < end_s:
            await clients.send(_PROMPT, _OUTPUT, streams)

    tasks = [asyncio.create_task(keep()) for _ in range(_CLIENTS)]
    await asyncio.sleep(_WARM_S)
    before, since_s = _used(), time.monotonic()
    await asyncio.sleep(seconds)
    after, until_s = _used(), time.monotonic()
    await asyncio.gather(*tasks)
    tokens = sum(since_s < at_s <= until_s for one in streams for at_s in one.times_s)
    faults, user, system = (last - first for first, last in zip(before, after, strict=True))
    rate = tokens / (until_s - since_s)
    return Served(allocator, round(rate, 1), round(faults / tokens, 1), round(system / (user + system), 3))


def _used() -> tuple[float, float, float]:
    """Page faults, and ticks of the processor for programs and for the system, of all workers."""
    totals = [0.0, 0.0, 0.0]
    for process in psutil.Process().children(recursive=True):
        if "serving.worker" in process.cmdline():
            fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
            totals = [total + float(fields[place]) for total, place in zip(totals, (7, 11, 12), strict=True)]
    return totals[0], totals[1], totals[2]


if __name__ == "__main__":
    sys.exit(main())
