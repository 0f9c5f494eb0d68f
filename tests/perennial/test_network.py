"""What networks do to a fleet. Needs network namespaces; steps aside where they may not be made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import psutil
import pytest

from perennial.fleet import Fleet
from perennial.network import Host, Network, NetworkRefused
from perennial.testing import collect, compare, fleet, given_plans, reference_streams
from serving import messages as m
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec
from serving.errors import TransportError
from serving.requests import GenerationRequest, Limits, Sampling
from serving.transport import Connection, from_below

PLANS = {1: "1x1x1", 2: "1x1x2", 3: "1x3x1"}
STREAMS = 5


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        with Network() as one:
            yield one
    except NetworkRefused as refusal:
        pytest.skip(str(refusal))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("network") / "model")
    create_checkpoint(
        path, family="llama", layers=6, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=300, max_positions=1024
    )
    return path


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{number}",
            prompt=tuple((number * 7 + at) % 290 + 4 for at in range(20 + number)),
            sampling=Sampling(temperature=0.8 * (number % 2), seed=number),
            limits=Limits(max_tokens=700, ignore_eos=True),
            resumable=True,
        )
        for number in range(STREAMS)
    ]


@asynccontextmanager
async def spread_out(network: Network, checkpoint: str) -> AsyncIterator[tuple[Fleet, dict[str, Host]]]:
    """A controller here, three instances on machines of their own."""
    plan = given_plans(read_spec(checkpoint), PLANS)
    async with fleet(checkpoint, instances=0, plan=plan, host=network.address, expected_instances=3) as service:
        hosts = [network.add_host() for _ in range(3)]
        names = [service.launch_at(host) for host in hosts]
        await service.wait_serving()
        yield service, dict(zip(names, hosts, strict=True))


@pytest.mark.slow
async def test_streams_outlive_a_partition_and_the_cut_off_instance_comes_back(
    network: Network, checkpoint: str
) -> None:
    """It does not know that it was given up, and goes on as if it were in force: nobody must hear that."""
    asked = requests()
    expected = reference_streams(checkpoint, asked)
    async with spread_out(network, checkpoint) as (service, hosts), service.client() as client:
        victim = sorted(hosts)[1]
        worker = psutil.Process(service.instances[victim].group.pid).children()[0]
        running = [asyncio.create_task(collect(client, request)) for request in asked]
        await _until_serving(service, STREAMS)
        since, began = len(service.events), time.time()
        network.cut(hosts[victim])
        lost = await service.wait_event(lambda event: event.kind == "instance_lost", since=since)
        assert lost.data["instance"] == victim
        assert lost.time_s - began < 1.0
        await service.wait_event(lambda event: event.kind == "layout", since=since)
        await _until_serving(service, STREAMS)  # on what is left
        network.mend(hosts[victim])
        joined = await service.wait_event(lambda event: event.kind == "instance_joined", since=since)
        assert joined.data["instance"] == victim
        await service.wait_serving()
        assert worker.is_running()
        assert f"{victim}/0" in {position.device for position in (await client.server_info()).positions}
        for request, stream in zip(asked, await asyncio.gather(*running), strict=True):
            assert not compare(expected[request.request_id], stream)
        assert [event.kind for event in service.events[since:]].count("instance_lost") == 1


async def _until_serving(service: Fleet, streams: int) -> None:
    async with asyncio.timeout(30.0):
        while (info := await service.info()) is None or info.running < streams:  # noqa: ASYNC110 - it is elsewhere
            await asyncio.sleep(0.01)


async def test_a_kernel_that_acknowledges_nothing_ends_a_connection(network: Network) -> None:
    """Whoever only listens would not notice for hours."""
    host = network.add_host()
    accepted: asyncio.Future[Connection[m.Upward]] = asyncio.get_running_loop().create_future()
    server = await asyncio.start_server(
        lambda reader, writer: accepted.set_result(from_below(reader, writer, 1 << 16)), network.address, 0
    )
    port = server.sockets[0].getsockname()[1]
    there = await asyncio.create_subprocess_exec(
        *host.enter, "python3", "-c", PEER, network.address, str(port), stdout=asyncio.subprocess.PIPE
    )
    connection = await accepted
    try:
        connection.expect_acknowledgement(0.3)
        connection.send(m.Alive())
        assert there.stdout is not None
        assert await asyncio.wait_for(there.stdout.readline(), 5.0) == b"heard\n"
        network.cut(host)
        began = time.monotonic()
        connection.send(m.Alive())
        with pytest.raises(TransportError, match="closed"):
            await asyncio.wait_for(connection.receive(), 5.0)
        assert 0.25 <= time.monotonic() - began < 1.5
    finally:
        there.kill()
        await there.wait()
        server.close()
        await connection.close()


PEER = """
import socket, sys
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
peer.recv(1)
print("heard", flush=True)
while peer.recv(1 << 20):
    pass
"""
