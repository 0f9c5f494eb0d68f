"""What stands still while the driver clears up after a process that was killed.

`python -m benchmarks.driver_calls --out DIR`, on a machine with a GPU, better with two

One process computes steps on the first GPU, and beside them a thread of it copies, makes events, or asks the driver
for memory, every 4 ms. A second process with much memory on the last GPU is killed. What counts is the longest
step in the second before, and in the second and a half after that.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from profiling.fingerprint import this_machine
from serving import lifeline

_BEFORE_S, _AFTER_S, _WARM_S, _READY_S = 1.0, 1.5, 0.5, 60.0
_PAUSE_S, _POLL_S = 0.004, 0.0002
_SIDE, _PRODUCTS = 4096, 25  # of the matrices of a step, and how many are multiplied: some milliseconds
_VICTIM_SHARE, _VICTIM_BLOCK_BYTES = 0.5, 1 << 30  # of the memory of its GPU
_HOST_BYTES, _DEVICE_BYTES = 8 << 20, 64 << 20
_READY = "ready"

Spell = tuple[float, float]
"""When something began, and how long it took; seconds."""


@dataclass(frozen=True, slots=True)
class Found:
    """Milliseconds: the longest step, and the longest call beside the steps, before and after the kill."""

    beside: str
    step_ms: float
    call_ms: float
    step_after_kill_ms: float
    call_after_kill_ms: float


def main(arguments: list[str] | None = None) -> int:
    """Measure and write `driver_calls.json`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.driver_calls", description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--victim", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this is about a GPU's driver, and there is no GPU here", file=sys.stderr)
        return 2
    if options.victim is not None:
        _be_victim(torch.device("cuda", options.victim))
    if options.out is None:
        parser.error("--out is missing")
    results = {"found": [asdict(one) for one in _measure()], "machine": this_machine("cuda").to_json()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "driver_calls.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def found(beside: str, kill_s: float, steps: Sequence[Spell], calls: Sequence[Spell]) -> Found:
    """Of what was under way in the second before a kill, and soon after it."""
    before, after = (kill_s - _BEFORE_S, kill_s), (kill_s, kill_s + _AFTER_S)
    return Found(beside, *(_longest_ms(spells, *part) for part in (before, after) for spells in (steps, calls)))


def _longest_ms(spells: Sequence[Spell], since_s: float, until_s: float) -> float:
    lengths = (length_s for begin_s, length_s in spells if begin_s < until_s and begin_s + length_s > since_s)
    return round(1e3 * max(lengths, default=0.0), 2)


def _measure() -> list[Found]:
    torch.cuda.set_device(0)
    last, stop, beside, steps = torch.cuda.device_count() - 1, threading.Event(), _Beside(), list[Spell]()
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(_step, steps, stop), threads.submit(beside.run, stop)]
        try:
            results = []
            for name in beside.actions:
                results.append(_one(name, beside, steps, last))
                for one in running:
                    if one.done():  # nothing was measured from then on
                        raise RuntimeError("steps, or what is done beside them, ended early") from one.exception()
                print(results[-1], flush=True)
            return results
        finally:
            stop.set()


def _one(name: str, beside: _Beside, steps: list[Spell], device: int) -> Found:
    """One victim, and what happened around its end."""
    command = [sys.executable, "-m", "benchmarks.driver_calls", "--victim", str(device)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as victim:
        late = threading.Timer(_READY_S, victim.kill)
        late.start()
        try:
            if victim.stdout is None or victim.stdout.readline().strip() != _READY:
                raise RuntimeError("the process that was to be killed did not start")
            beside.name = name
            time.sleep(_WARM_S + _BEFORE_S)
            kill_s = time.monotonic()
        finally:
            late.cancel()
            victim.kill()
        time.sleep(_AFTER_S)
        beside.name = "nothing"
        return found(name, kill_s, list(steps), list(beside.calls))


def _step(steps: list[Spell], stop: threading.Event) -> None:
    """One recorded step after the other, as a replica computes them."""
    stream, graph, done = torch.cuda.Stream(priority=-1), torch.cuda.CUDAGraph(), torch.cuda.Event()
    with torch.cuda.stream(stream), torch.inference_mode():
        matrix = torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16)
        torch.matmul(matrix, matrix)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(_PRODUCTS):
                torch.matmul(matrix, matrix)
        while not stop.is_set():
            begun_s = time.monotonic()
            graph.replay()
            done.record()
            while not done.query():
                if time.monotonic() - begun_s > _READY_S:
                    raise TimeoutError(f"a step was not over after {_READY_S:g} s")
                time.sleep(_POLL_S)
            steps.append((begun_s, time.monotonic() - begun_s))


class _Beside:
    """What another thread does again and again: the action called `name`."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._host = torch.empty(_HOST_BYTES, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty(_HOST_BYTES, dtype=torch.uint8, device="cuda")
        self.name = "nothing"
        self.calls: list[Spell] = []
        self.actions: dict[str, Callable[[], None]] = {
            "nothing": lambda: None,
            "copies": self._copy,
            "events": self._event,
            "host memory": lambda: self._take("cuMemAllocHost_v2", "cuMemFreeHost", _HOST_BYTES),
            "device memory": lambda: self._take("cuMemAlloc_v2", "cuMemFree_v2", _DEVICE_BYTES),
        }

    def run(self, stop: threading.Event) -> None:
        """Act every few milliseconds."""
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.wait(_PAUSE_S):
                begun_s = time.monotonic()
                self.actions[self.name]()
                self.calls.append((begun_s, time.monotonic() - begun_s))

    def _copy(self) -> None:
        self._device.copy_(self._host, non_blocking=True)
        torch.cuda.current_stream().synchronize()

    def _event(self) -> None:
        event = torch.cuda.Event()
        event.record()
        event.synchronize()

    def _take(self, take: str, give: str, size: int) -> None:
        address = ctypes.c_uint64()
        if status := getattr(self._driver, take)(ctypes.byref(address), ctypes.c_size_t(size)):
            raise RuntimeError(f"{take} failed with status {status}")
        getattr(self._driver, give)(address)


def _be_victim(device: torch.device) -> None:
    """Take much memory, compute, and wait for the end."""
    lifeline.watch_stdin()
    blocks = int(_VICTIM_SHARE * torch.cuda.get_device_properties(device).total_memory) // _VICTIM_BLOCK_BYTES
    kept = [torch.ones(_VICTIM_BLOCK_BYTES, dtype=torch.uint8, device=device) for _ in range(blocks)]
    matrix = torch.randn(_SIDE, _SIDE, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize(device)
    print(_READY, flush=True)
    while kept:
        torch.matmul(matrix, matrix)
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
