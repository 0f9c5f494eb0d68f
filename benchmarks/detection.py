"""How soon a loss is noticed: `python -m benchmarks.detection [--repetitions 20 --calm-s 60 --out DIR]`.

A real fleet of four instances with streams running. Each repetition lets one thing happen and takes the
time until the controller's event that says so. Then nothing happens for a while, with busy loops beside
the fleet: every loss that is reported then is a false alarm.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from perennial.fleet import Fleet
from perennial.hang import HangRefused, busiest_thread, hung
from perennial.network import Network, NetworkRefused
from perennial.testing import fleet, given_plans
from profiling.fingerprint import this_machine
from serving.api.client import Client
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec
from serving.errors import PerennialError
from serving.requests import Event, Limits

BARS_S = {"kill_instance": 0.1, "kill_worker": 0.1, "stop_instance": 0.3, "stop_worker": 0.3, "partition": 0.4}
_MODEL = {"family": "llama", "layers": 6, "hidden": 64, "heads": 8, "kv_heads": 4, "ffn": 128, "max_positions": 1024}
_LOSSES = ("instance_lost", "worker_lost", "replica_failed")
_INSTANCES = 4
_STREAMS = 4
_HOGS = 4
_PAIR = {1: "1x1x1", 2: "1x1x2"}

Happening = Callable[[Fleet, int], Awaitable[float]]  # does it, and returns the seconds until it was noticed


def main() -> int:
    """Run, print, write; 1 if a bar is not met."""
    parser = argparse.ArgumentParser(prog="benchmarks.detection", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--calm-s", type=float, default=60.0, help="how long to wait for false alarms under load")
    parser.add_argument("--hogs", type=int, default=0, help="busy loops beside the fleet during the repetitions")
    parser.add_argument("--only", nargs="*", choices=[*HAPPENINGS, "partition"], help="what shall happen; default all")
    parser.add_argument("--out", type=Path, help="folder for detection.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="perennial-detection-") as folder:
        result = asyncio.run(_measure(Path(folder), arguments))
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "detection.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["met"] else 1


async def _measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    checkpoint = str(folder / "model")
    create_checkpoint(checkpoint, **_MODEL)  # type: ignore[arg-type]
    wanted = arguments.only or [*HAPPENINGS, "partition"]
    detected: dict[str, Any] = {}
    with _busy(arguments.hogs):
        for name in [name for name in HAPPENINGS if name in wanted]:
            detected[name] = await _repeat_in_fleet(checkpoint, HAPPENINGS[name], arguments.repetitions)
        if "partition" in wanted:
            detected["partition"] = await _partitions(checkpoint, arguments.repetitions)
    alarms = await _false_alarms(checkpoint, arguments.calm_s)
    late = [name for name, one in detected.items() if one.get("max_s", 0.0) > BARS_S.get(name, float("inf"))]
    return {
        "repetitions": arguments.repetitions,
        "busy_loops": arguments.hogs,
        "detected": detected,
        "bars_s": BARS_S,
        "false_alarms": alarms,
        "met": not late and not alarms["events"],
        "machine": this_machine().to_json(),
    }


def summary(times_s: Sequence[float]) -> dict[str, Any]:
    """P50, P99 (of few: the largest) and maximum, and all of them in the order they were taken."""
    ordered = sorted(times_s)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    shown = {"p50_s": median(ordered), "p99_s": p99, "max_s": ordered[-1]}
    return {**{name: round(value, 4) for name, value in shown.items()}, "times_s": [round(one, 4) for one in times_s]}


async def _repeat_in_fleet(checkpoint: str, happening: Happening, repetitions: int) -> dict[str, Any]:
    async with fleet(checkpoint, instances=_INSTANCES) as service, _streams(service):
        return await _repeat(service, happening, repetitions)


async def _repeat(service: Fleet, happening: Happening, repetitions: int) -> dict[str, Any]:
    times_s = []
    try:
        for number in range(repetitions):
            await service.wait_serving(timeout_s=120.0)
            times_s.append(await happening(service, number))
            what = happening.__name__.strip("_").replace("_", " ")
            print(f"{what} {number + 1} of {repetitions}: noticed after {1e3 * times_s[-1]:.0f} ms", file=sys.stderr)
    except HangRefused as error:
        return {"not_measured": str(error)}
    return summary(times_s)


async def _noticed(service: Fleet, kind: str, name: str, since: int, began: float) -> float:
    """Seconds from `began` (Unix time) to the event that instance or device `name` was lost."""

    def accept(event: Event) -> bool:
        return event.kind == kind and name in (event.data.get("instance"), event.data.get("device"))

    return (await service.wait_event(accept, since=since, timeout_s=60.0)).time_s - began


# -- what happens -------------------------------------------------------------------------------------


def _pick(service: Fleet, number: int) -> str:
    names = sorted(service.instances)
    return names[number % len(names)]


def _worker(service: Fleet, name: str) -> psutil.Process:
    return psutil.Process(service.instances[name].group.pid).children()[0]


async def _kill_instance(service: Fleet, number: int) -> float:
    name, since, began = _pick(service, number), len(service.events), time.time()
    killing = asyncio.create_task(service.kill(name))
    noticed_s = await _noticed(service, "instance_lost", name, since, began)
    await killing
    await service.add()
    return noticed_s


async def _kill_worker(service: Fleet, number: int) -> float:
    name, since, began = _pick(service, number), len(service.events), time.time()
    _worker(service, name).kill()
    return await _noticed(service, "worker_lost", f"{name}/0", since, began)


async def _stop_instance(service: Fleet, number: int) -> float:
    name, since, began = _pick(service, number), len(service.events), time.time()
    service.suspend(name)
    noticed_s = await _noticed(service, "instance_lost", name, since, began)
    service.resume(name)
    return noticed_s


async def _stop_worker(service: Fleet, number: int) -> float:
    name, since, began = _pick(service, number), len(service.events), time.time()
    _worker(service, name).suspend()
    return await _noticed(service, "worker_lost", f"{name}/0", since, began)


async def _hang_worker(service: Fleet, number: int) -> float:
    """Its step loop hangs. Whether the worker is to blame depends on where; the only replica fails anyway."""
    name = _pick(service, number)
    thread = await asyncio.to_thread(busiest_thread, _worker(service, name).pid)
    since, began = len(service.events), time.time()
    with hung(thread):
        failed = await service.wait_event(lambda event: event.kind == "replica_failed", since=since)
    return failed.time_s - began


HAPPENINGS: dict[str, Happening] = {
    "kill_instance": _kill_instance,
    "kill_worker": _kill_worker,
    "stop_instance": _stop_instance,
    "stop_worker": _stop_worker,
    "hang_worker": _hang_worker,
}


async def _partitions(checkpoint: str, repetitions: int) -> dict[str, Any]:
    """Two instances on machines of their own; the link of one is cut again and again."""
    plan = given_plans(read_spec(checkpoint), _PAIR)
    try:
        async with AsyncExitStack() as stack:
            network = stack.enter_context(Network())
            service = await stack.enter_async_context(
                fleet(checkpoint, instances=0, plan=plan, host=network.address, expected_instances=2)
            )
            hosts = [network.add_host(), network.add_host()]
            names = [service.launch_at(host) for host in hosts]
            await service.wait_serving(timeout_s=120.0)
            await stack.enter_async_context(_streams(service))

            async def cut(service: Fleet, number: int) -> float:
                since, began = len(service.events), time.time()
                network.cut(hosts[number % 2])
                noticed_s = await _noticed(service, "instance_lost", names[number % 2], since, began)
                network.mend(hosts[number % 2])
                return noticed_s

            return await _repeat(service, cut, repetitions)
    except NetworkRefused as error:
        return {"not_measured": str(error)}


# -- what must not happen -----------------------------------------------------------------------------


async def _false_alarms(checkpoint: str, seconds: float) -> dict[str, Any]:
    """Losses reported within `seconds` in which none occurred, with busy loops beside the fleet."""
    async with fleet(checkpoint, instances=_INSTANCES) as service, _streams(service) as tokens:
        with _busy(_HOGS):
            since, before = len(service.events), tokens[0]
            await asyncio.sleep(seconds)
            found = [event for event in service.events[since:] if event.kind in _LOSSES]
            delivered = tokens[0] - before
    events = [f"{event.kind} {event.data}" for event in found]
    return {"seconds": seconds, "busy_loops": _HOGS, "tokens": delivered, "events": events}


@contextmanager
def _busy(count: int) -> Iterator[None]:
    """So many processes that compute without end, until the block, or this process, ends."""
    loop = (
        "import os, threading; threading.Thread(target=lambda: (os.read(0, 1), os._exit(0))).start()\nwhile True: pass"
    )
    command = [sys.executable, "-c", loop]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()


@asynccontextmanager
async def _streams(service: Fleet) -> AsyncIterator[list[int]]:
    """Streams that follow each other until the block ends; yields a list of the number of tokens so far."""
    tokens = [0]
    async with service.client() as client:
        running = [asyncio.create_task(_stream(client, number, tokens)) for number in range(_STREAMS)]
        try:
            yield tokens
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def _stream(client: Client, number: int, tokens: list[int]) -> None:
    prompt = [(number * 7 + at) % 290 + 4 for at in range(20 + 100 * number)]
    while True:
        try:
            async for chunk in client.stream(prompt, limits=Limits(max_tokens=400, ignore_eos=True)):
                tokens[0] += len(chunk.token_ids)
        except PerennialError:
            await asyncio.sleep(0.2)  # nothing serves at the moment


if __name__ == "__main__":
    sys.exit(main())
