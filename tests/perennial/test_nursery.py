import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial.nursery import Nursery
from perennial.processes import ProcessGroup, gone
from perennial.testing import collect, compare, fleet, reference_streams
from serving.engine.checkpoint import create_checkpoint
from serving.requests import GenerationRequest, Limits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pidfds and fork with threads")


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with Nursery(tmp_path_factory.mktemp("nursery")) as one:
        yield one


async def test_a_forked_fleet_serves_and_survives_and_ends(nursery: Nursery, tmp_path: Path) -> None:
    checkpoint = str(tmp_path / "tiny")
    create_checkpoint(checkpoint, family="llama", layers=4, hidden=64, heads=8, kv_heads=4, ffn=128)
    request = GenerationRequest(request_id="one", prompt=(9, 8, 7), limits=Limits(max_tokens=60, ignore_eos=True))
    async with fleet(checkpoint, instances=2, home=tmp_path, start=nursery.start) as service:
        assert len(service.alive()) == 5  # a controller, two agents, two workers
        async with service.client() as client:
            await service.kill("i0")
            await service.restart_controller()
            await service.wait_serving()
            delivered = await collect(client, request)
        kinds = {event.kind for event in service.events}
    assert not compare(reference_streams(checkpoint, [request])["one"], delivered)
    assert "instance_lost" in kinds
    assert not service.alive()


async def test_a_forked_process_says_how_it_ended(nursery: Nursery, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serving.agent", "--settings", "missing", "--instance", "a", "--type", "t"]
    group = ProcessGroup("a", [*command, "--controller", "nowhere"], tmp_path / "a.log", start=nursery.start)
    assert await group.wait(20.0) == 1
    group.cut_lifeline()
    assert "is not an address" in group.tail()


async def test_what_was_forked_does_not_outlive_the_nursery(tmp_path: Path) -> None:
    settings = tmp_path / "serving.json"
    settings.write_text('{"checkpoint": "", "journal": "", "token": ""}')
    command = [sys.executable, "-m", "serving.agent", "--settings", str(settings), "--instance", "a", "--type", "t"]
    with Nursery(tmp_path) as nursery:
        group = ProcessGroup("a", [*command, "--controller", "127.0.0.1:1"], tmp_path / "a.log", start=nursery.start)
        assert group.alive
    assert await gone([group.pid], 10.0) == []
    group.cut_lifeline()
