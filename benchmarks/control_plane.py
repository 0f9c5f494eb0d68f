"""What the control plane costs: `python -m benchmarks.control_plane [--streams 200 --seconds 10 --out DIR]`.

A real controller (journal, gRPC, metrics), a real agent and worker, and a client in a process of its
own; only the model is replaced by one that emits tokens for nothing, at a pace slightly over the bar.
Latency is from the draw of a token in the worker to its receipt by the client's code.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

import psutil

from data.cluster import ClusterSpec, ClusterState, InstanceType
from data.explanation import Estimate
from data.layout import ParallelConfig
from data.models import ModelSpec
from data.plan import Objective, Plan, PlanBook
from profiling.fingerprint import this_machine
from serving import settings
from serving.api.client import Client
from serving.engine.checkpoint import create_checkpoint
from serving.engine.free import CLOCK_S

BAR_TOKENS_PER_S = 20_000
BAR_P99_MS = 20.0
_PACE = 1.05  # of the bar
_CONTEXT_TOKENS = 1 << 15


def main() -> int:
    """Run, print, write; 1 if the bar is not met."""
    parser = argparse.ArgumentParser(prog="benchmarks.control_plane", description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=_PACE * BAR_TOKENS_PER_S, help="tokens/s drawn; 0: no limit")
    parser.add_argument("--out", type=Path, help="folder for control_plane.json")
    arguments = parser.parse_args()
    result = run(arguments.streams, arguments.seconds, arguments.rate)
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "control_plane.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["met"] else 1


def run(streams: int, seconds: float, rate: float) -> dict[str, Any]:
    """Measure once; rates are tokens per second, latencies milliseconds."""
    with tempfile.TemporaryDirectory() as folder, _service(Path(folder), streams, rate) as (address, processes):
        before = {name: _cpu_s(process) for name, process in processes.items()}
        begun = time.monotonic()
        measured = _client(address, streams, seconds)
        elapsed_s = time.monotonic() - begun
        cores = {name: (_cpu_s(process) - before[name]) / elapsed_s for name, process in processes.items()}
    return {
        "streams": streams,
        "seconds": seconds,
        "paced_tokens_per_s": rate,
        **measured,
        "cores_used": {name: round(used, 2) for name, used in cores.items()},
        "bar": {"tokens_per_s": BAR_TOKENS_PER_S, "p99_ms": BAR_P99_MS},
        "met": measured["tokens_per_s"] >= BAR_TOKENS_PER_S and measured["added_latency_ms"]["p99"] <= BAR_P99_MS,
        "machine": this_machine().to_json(),
    }


@contextmanager
def _service(folder: Path, streams: int, rate: float) -> Iterator[tuple[str, dict[str, psutil.Process]]]:
    """A controller and an agent with one worker; their processes end with this context."""
    path = _write_settings(folder, streams, rate)
    controller = _spawn("serving.controller", "--settings", str(path), "--lifeline")
    processes = [controller]
    try:
        addresses = _wait_for_file(folder / "ready.json", controller)
        place = ["--instance", "local-0", "--type", "local-cpu", "--controller", addresses["control"]]
        agent = _spawn("serving.agent", "--settings", str(path), "--lifeline", *place)
        processes.append(agent)
        asyncio.run(_wait_until_serving(addresses["grpc"]))
        worker = psutil.Process(agent.pid).children()[0]
        yield addresses["grpc"], {"controller": psutil.Process(controller.pid), "worker": worker}
    finally:
        for process in processes:
            process.communicate(timeout=20)  # closes its lifeline


def _write_settings(folder: Path, streams: int, rate: float) -> Path:
    spec = create_checkpoint(
        str(folder / "model"), family="llama", layers=1, hidden=16, heads=1, kv_heads=1, ffn=16, vocab=512,
        max_positions=_CONTEXT_TOKENS,
    )  # fmt: skip
    (folder / "plan.json").write_bytes(_plan_book(spec, streams).to_bytes())
    configuration = settings.ServingSettings(
        checkpoint=str(folder / "model"),
        journal=str(folder / "journal.db"),
        token="benchmark",
        plan=str(folder / "plan.json"),
        ready_file=str(folder / "ready.json"),
        engine=settings.EngineSettings(
            numerics="free",
            free_step_s=streams / rate if rate else 0.0,
            step_tokens=4 * streams,
            kv_memory_bytes=1 << 30,
            block_tokens=256,
        ),
    )
    path = folder / "settings.json"
    path.write_bytes(settings.dump(configuration))
    return path


def _plan_book(spec: ModelSpec, streams: int) -> PlanBook:
    local = InstanceType("local-cpu", 1, "cpu", 4 << 30, 1e9, 4e9, 0.04, 0.01)
    config = ParallelConfig(replicas=1, stages=1, shards=1, max_batch=streams)
    plan = Plan(ClusterState.of({"local-cpu": 1}), config, Estimate(1.0, 1.0, 1 << 20), "the only one")
    return PlanBook(spec, ClusterSpec("one", (local,), (1,)), Objective(1.0, 8, 128), "fixed", "", (plan,))


def _spawn(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE)


def _wait_for_file(path: Path, process: subprocess.Popen[bytes], within_s: float = 60.0) -> dict[str, Any]:
    end = time.monotonic() + within_s
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit("the controller did not start; its message is above")
        time.sleep(0.05)
    addresses: dict[str, Any] = json.loads(path.read_text())
    return addresses


async def _wait_until_serving(address: str, within_s: float = 60.0) -> None:
    async with Client(address) as client, asyncio.timeout(within_s), aclosing(client.watch_events()) as events:
        async for _ in events:
            if (await client.server_info()).state == "serving":
                return


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _client(address: str, streams: int, seconds: float) -> dict[str, Any]:
    arguments = {"address": address, "streams": streams, "seconds": seconds}
    arguments |= {"max-tokens": _CONTEXT_TOKENS, "clock-s": CLOCK_S}
    command = [sys.executable, "-m", "benchmarks.stream_reader"]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=seconds + 60)
    measured: dict[str, Any] = json.loads(finished.stdout)
    return measured


if __name__ == "__main__":
    sys.exit(main())
