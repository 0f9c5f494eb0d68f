"""Measuring processes: started together, listened to with a deadline, and always ended."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import IO

import msgspec

from data.errors import PerennialError
from profiling.campaign import Answer, Campaign, Finished, Refused

_ROOT = Path(__file__).resolve().parent.parent
_CHECK_S = 0.5
_END_S = 5.0


def follow(campaign: Campaign, *, timeout_s: float) -> Iterator[Answer]:
    """Run a campaign on `campaign.world` processes and yield what rank 0 says, up to `Finished`.

    Raises `PerennialError` if a process dies, refuses, or the campaign outlasts `timeout_s`.
    """
    with TemporaryDirectory(prefix="perennial-profile-") as folder, _workers(campaign, Path(folder)) as workers:
        lines = _lines(workers[0].stdout)
        deadline_s = monotonic() + timeout_s
        while True:
            answer = _next(lines, workers, Path(folder), deadline_s)
            if isinstance(answer, Refused):
                raise PerennialError(f"the profile cannot be measured: {answer.reason}")
            yield answer
            if isinstance(answer, Finished):
                return


@contextmanager
def _workers(campaign: Campaign, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    own = msgspec.structs.replace(campaign, store=str(folder / "store"))
    (folder / "campaign.json").write_bytes(msgspec.json.encode(own))
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(campaign.world):
            workers.append(_start(folder, rank, campaign.threads))
        yield workers
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait(_END_S)
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()


def _start(folder: Path, rank: int, threads: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(part for part in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if part)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "profiling.worker", str(folder / "campaign.json"), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends them
        )


def _lines(pipe: IO[bytes] | None) -> queue.SimpleQueue[bytes]:
    """Lines of a pipe as they come; an empty one at its end."""
    assert pipe is not None
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        try:
            for line in pipe:
                lines.put(line)
        except ValueError:  # closed under the reader: the campaign is over
            pass
        lines.put(b"")

    threading.Thread(target=read, name="profile-reader", daemon=True).start()
    return lines


def _next(
    lines: queue.SimpleQueue[bytes], workers: list[subprocess.Popen[bytes]], folder: Path, deadline_s: float
) -> Answer:
    while monotonic() < deadline_s:
        try:
            line = lines.get(timeout=_CHECK_S)
        except queue.Empty:
            _check_alive(workers, folder)
            continue
        if line:
            return msgspec.json.decode(line, type=Answer)
        raise _death(folder, 0)
    raise PerennialError("the profile took too long; give it a smaller budget or fewer shards")


def _check_alive(workers: list[subprocess.Popen[bytes]], folder: Path) -> None:
    for rank, worker in enumerate(workers):
        if worker.poll() not in (None, 0):
            raise _death(folder, rank)


def _death(folder: Path, rank: int) -> PerennialError:
    log = (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return PerennialError(f"measuring process {rank} died: {log[-1] if log else 'it said nothing'}")
