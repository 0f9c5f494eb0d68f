"""A worker whose step loop hangs while the rest of it lives on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from perennial.comparison import indexed
from perennial.hang import HangRefused, busiest_thread, hung
from perennial.testing import compare, fleet, given_plans, reference_streams
from serving.api.client import Client
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec
from serving.requests import GenerationRequest, Limits
from serving.settings import Timeouts

COUNTER = """
import itertools, sys, threading
threading.Thread(target=lambda: [None for _ in itertools.count()], daemon=True).start()
input()
"""


def state(pid: int, tid: int) -> str:
    return Path(f"/proc/{pid}/task/{tid}/stat").read_text().rpartition(")")[2].split()[0]


def test_one_thread_hangs_and_the_others_do_not() -> None:
    process = subprocess.Popen([sys.executable, "-c", COUNTER], stdin=subprocess.PIPE)
    try:
        thread = busiest_thread(process.pid)
        with _permitted(thread):
            _until(lambda: state(process.pid, thread) == "t")
            assert state(process.pid, process.pid) == "S"
        _until(lambda: state(process.pid, thread) == "R")
        with hung(thread):
            process.kill()
        assert process.wait(5.0) == -9
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def _permitted(thread: int) -> Iterator[None]:
    try:
        with hung(thread):
            yield
    except HangRefused as refusal:
        pytest.skip(str(refusal))


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5.0
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


async def _follow(client: Client, request: GenerationRequest, delivered: list[tuple[int, int]]) -> None:
    options = {"request_id": request.request_id, "limits": request.limits, "resumable": request.resumable}
    async with contextlib.aclosing(client.stream(request.prompt, **options)) as chunks:
        async for chunk in chunks:
            delivered += indexed([chunk])


def _patience(seconds: float) -> float:
    """Longer where others compute on these cores too."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1], ids=["the leader", "its peer"])
async def test_a_replica_that_hangs_is_given_up_within_a_second_or_two(tmp_path: Path, rank: int) -> None:
    checkpoint = str(tmp_path / "model")
    create_checkpoint(
        checkpoint, family="llama", layers=4, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=300, max_positions=1024
    )
    request = GenerationRequest(
        request_id="r", prompt=tuple(range(5, 40)), limits=Limits(max_tokens=900, ignore_eos=True), resumable=True
    )
    expected = reference_streams(checkpoint, [request])["r"]
    plan = given_plans(read_spec(checkpoint), {1: "1x1x1", 2: "1x1x2"})
    async with fleet(checkpoint, instances=2, plan=plan) as service, service.client() as client:
        delivered: list[tuple[int, int]] = []
        stream = asyncio.create_task(_follow(client, request, delivered))
        async with asyncio.timeout(30.0):
            while not (info := await client.server_info()).running:  # noqa: ASYNC110 - the service is elsewhere
                await asyncio.sleep(0.01)
        name = next(one.device for one in info.positions if one.shard == rank).partition("/")[0]
        worker = psutil.Process(service.instances[name].group.pid).children()[0]
        thread = await asyncio.to_thread(busiest_thread, worker.pid, within_s=0.1)
        since, began = len(service.events), time.time()
        assert not stream.done(), "there is nothing left to disturb"
        with _permitted(thread):
            failed = await service.wait_event(lambda event: event.kind == "replica_failed", since=since)
        reasons = [str(event.data["reason"]) for event in service.events[since:] if event.kind == "worker_lost"]
        # Stopped while it held the interpreter, a thread takes its whole process along: then a lease ends it.
        within_s = Timeouts().lease_s + 1.5 if any("was silent" in reason for reason in reasons) else 3.5
        assert failed.time_s - began < _patience(within_s), reasons
        more = min(len(delivered) + 80, len(expected))
        async with asyncio.timeout(60.0):
            while len(delivered) < more:  # noqa: ASYNC110 - the service is elsewhere
                await asyncio.sleep(0.05)
        stream.cancel()
        assert not compare(expected, delivered, finished=False)
