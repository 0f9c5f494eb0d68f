"""Bad input to a real service: each a clear error, while the stream of somebody else goes on undisturbed.

Damaged plans and wrong join tokens are in `test_fleet.py`, next to good ones.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from serving.api.client import Client
from serving.errors import InvalidInput, NotFound, PerennialError, QueueFull, Unavailable
from serving.requests import Limits, Sampling
from serving.settings import dump
from tests.serving.controller.test_journal import fill_disk, small_disk
from tests.serving.live import LiveFleet, tokens_of

UNDISTURBED: list[int] = []  # filled by the first test: the model is the same in all of them


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_disk(tmp_path_factory.mktemp("small") / "disk", "4m") as path:
        yield path


def serving(home: Path, journal: Path | None = None) -> Iterator[LiveFleet]:
    one = LiveFleet(home, {1: (1, 1, 1), 2: (1, 2, 1)}, instances=1, journal=journal)
    one.start_controller()
    one.add()
    try:
        yield one
    finally:
        assert one.end() == []


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFleet]:
    yield from serving(tmp_path_factory.mktemp("fleet"))


@asynccontextmanager
async def somebody_else(fleet: LiveFleet, run: str) -> AsyncIterator[None]:
    """A stream that runs meanwhile, and must be what it is when nothing happens."""
    async with fleet.client() as client:
        before = await fleet.ready(1)
        if not UNDISTURBED:
            UNDISTURBED.extend(await tokens_of(client, 1, "undisturbed", count=400))
        running = asyncio.create_task(tokens_of(client, 1, run, count=400))
        await fleet.until(lambda info: info.running == 1)
        try:
            yield
            assert await asyncio.wait_for(running, 60.0) == UNDISTURBED
            assert (await client.server_info()).epoch == before.epoch
        finally:
            running.cancel()


REQUESTS: dict[str, tuple[dict[str, Any], type[PerennialError], str]] = {
    "unknown model": ({"model": "Other/Model"}, NotFound, "Model 'Other/Model' is not served here"),
    "prompt as long as the context": ({"prompt": [5] * 1024}, InvalidInput, "The prompt has 1024 tokens; the context"),
    "text over the context": ({"prompt": "long " * 2000}, InvalidInput, "leaves no room to answer"),
    "token beyond the vocabulary": ({"prompt": [5, 300]}, InvalidInput, "Token id 300 of the prompt is out of range"),
    "gigantic message": ({"prompt": "x" * (5 << 20)}, InvalidInput, "larger than max"),
    "negative max_tokens": ({"limits": Limits(max_tokens=-1)}, InvalidInput, "max_tokens must be 1 or more, not -1"),
    "negative temperature": ({"sampling": Sampling(temperature=-1.0)}, InvalidInput, "temperature must be 0 or more"),
    "negative deadline": ({"deadline_s": -1.0}, InvalidInput, "deadline_s must be a number of seconds"),
}


async def test_bad_requests(fleet: LiveFleet) -> None:
    async with somebody_else(fleet, "requests"), fleet.client() as client:
        for fields, error, sentence in REQUESTS.values():
            with pytest.raises(error, match=sentence):
                await client.generate(**{"prompt": [5, 6], **fields})
        await _send_no_utf8(fleet)


async def _send_no_utf8(fleet: LiveFleet) -> None:
    """Field 3, the text, with two bytes that are no UTF-8."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{fleet.settings.grpc_port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="must be UTF-8") as failure:
            await channel.unary_unary("/perennial.v1.Inference/Generate")(b"\x1a\x02\xff\xfe")
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_instance_with_a_half_written_checkpoint(fleet: LiveFleet) -> None:
    half = fleet.home / "half"
    shutil.copytree(fleet.settings.checkpoint, half)
    os.truncate(half / "model.safetensors", 1000)
    async with somebody_else(fleet, "checkpoint"):
        name = fleet.add(checkpoint=str(half))
        async with asyncio.timeout(30.0):
            while "is not a complete safetensors file" not in fleet.log(name):  # noqa: ASYNC110 - another's log
                await asyncio.sleep(0.1)
        fleet.kill(name)


SECOND: dict[str, dict[str, str | int]] = {
    "another controller uses it": {},
    "is the port in use": {"journal": "other", "control_port": 0},
    "choose another control port": {"journal": "another"},
}


async def test_a_second_controller_in_the_same_place(fleet: LiveFleet) -> None:
    async with somebody_else(fleet, "second"):
        for sentence, changes in SECOND.items():
            ended = await asyncio.to_thread(_start_second, fleet, changes)
            assert ended.returncode == 1
            assert sentence in ended.stderr.splitlines()[-1]


def _start_second(fleet: LiveFleet, changes: dict[str, str | int]) -> subprocess.CompletedProcess[str]:
    path = fleet.home / "second.json"
    path.write_bytes(dump(msgspec.structs.replace(fleet.settings, **changes)))
    command = [sys.executable, "-m", "serving.controller", "--settings", str(path)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    return subprocess.run(command, cwd=fleet.home, env=environment, capture_output=True, text=True, timeout=60)


async def test_no_space_for_the_journal(tmp_path: Path, disk: Path) -> None:
    for fleet in serving(tmp_path, journal=disk / "journal"):
        async with somebody_else(fleet, "disk"), fleet.client(give_up_s=0.5) as client:
            fill_disk(disk)
            with pytest.raises(Unavailable, match="free some space and try again") as given_up:
                await _until_full(client)
            assert isinstance(given_up.value.__cause__, QueueFull)
        (disk / "filler").unlink()
        async with fleet.client() as client:
            assert len(await tokens_of(client, 2, "room-again", count=20)) == 20


async def _until_full(client: Client) -> None:
    """Requests with long prompts, until the pages that the journal still has are used up."""
    for number in range(1000):
        await client.generate([5] * 1000, request_id=f"filling-{number}", limits=Limits(max_tokens=1))
