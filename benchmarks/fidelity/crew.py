"""Fleets side by side: each in a process of its own, on processors of its own, which its children inherit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import InvalidInput

_LONGEST_S = 1500.0  # of one run, on two processors
_END_S = 30.0
_LEAST_PROCESSORS = 2
# Workers have one thread anyway; what probes the processors beside them is to have no more.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Job:
    """A script and a seed."""

    script: str
    seed: int

    def __str__(self) -> str:
        return f"{self.script}, seed {self.seed}"


def shares_of(processors: Sequence[int], jobs: int) -> list[list[int]]:
    """As many processors for each of `jobs` fleets, neighbours together. Raises `InvalidInput` if they are too few."""
    each = len(processors) // max(jobs, 1)
    if jobs < 1 or each < _LEAST_PROCESSORS:
        raise InvalidInput(
            f"{jobs} fleets side by side need at least {max(jobs, 1) * _LEAST_PROCESSORS} processors, and this process "
            f"may use {len(processors)}; choose --jobs from 1 to {len(processors) // _LEAST_PROCESSORS}"
        )
    return [list(processors[first : first + each]) for first in range(0, jobs * each, each)]


async def play_all(jobs: Sequence[Job], processors: Sequence[Sequence[int]], path: Path) -> list[str]:
    """Play every job on the first share of processors that is free, record it in `path`; returns what failed."""
    free: asyncio.Queue[Sequence[int]] = asyncio.Queue()
    for share in processors:
        free.put_nowait(share)
    begun_s, failed = time.monotonic(), list[str]()

    async def one(job: Job) -> None:
        share = await free.get()
        try:
            _say(begun_s, f"{job}, on {len(share)} processors")
            problem = await _play(job, share, path)
        finally:
            free.put_nowait(share)
        _say(begun_s, problem or f"{job}: recorded")
        failed.extend([problem] if problem else [])

    await asyncio.gather(*map(one, jobs))
    return failed


async def _play(job: Job, share: Sequence[int], path: Path) -> str:
    """What went wrong, if anything did."""
    with tempfile.TemporaryDirectory(prefix="perennial-fidelity-") as folder:
        own = Path(folder) / "recording.jsonl"
        command = [sys.executable, "-m", "benchmarks.fidelity.alone", job.script, str(job.seed), str(own)]
        with (Path(folder) / "said").open("wb") as said:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stderr=said, env={**os.environ, **_ONE_THREAD}
            )
        os.sched_setaffinity(process.pid, share)  # long before it has threads or children
        try:
            await asyncio.wait_for(process.wait(), _LONGEST_S)
        except TimeoutError:
            await _end(process)
            return f"{job}: not over after {_LONGEST_S:g} s"
        if process.returncode or not own.exists():
            lines = (Path(folder) / "said").read_text(errors="replace").strip().splitlines()
            return f"{job}: {lines[-1] if lines else f'exit code {process.returncode}'}"
        with path.open("ab") as file:
            file.write(own.read_bytes())
    return ""


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ask, and then do not ask any more; its fleet ends with it."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _END_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def _say(begun_s: float, text: str) -> None:
    print(f"[{time.monotonic() - begun_s:6.1f} s] {text}", flush=True)
