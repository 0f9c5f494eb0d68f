"""`perennial agent`: an instance from elsewhere joins a running service, and a stranger does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL

from perennial.processes import ProcessGroup, python_module
from perennial.testing import Fleet, collect, compare, fleet, given_plans, reference_streams
from serving.engine.checkpoint import create_checkpoint
from serving.requests import GenerationRequest, Limits


@contextmanager
def agent(service: Fleet, home: Path, name: str, token: str) -> Iterator[ProcessGroup]:
    """The command, with a home and an address of its own."""
    token_file = home / f"{name}-token"
    token_file.write_text(f"{token}\n")
    address = f"{service.settings.host}:{service.settings.control_port}"
    command = python_module("perennial.cli", "agent", "--controller", address, "--type", "local-cpu")
    command += ["--checkpoint", service.settings.checkpoint, "--instance", name, "--host", "127.0.0.2"]
    command += ["--token-file", str(token_file)]
    group = ProcessGroup(name, command, home / f"{name}.log", environment={"PERENNIAL_HOME": str(home)})
    try:
        yield group
    finally:
        group.signal(SIGKILL)
        group.cut_lifeline()


async def test_an_instance_with_an_address_of_its_own_joins_and_is_dismissed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    spec = create_checkpoint(str(checkpoint), family="llama", layers=4, hidden=64, ffn=128)
    request = GenerationRequest(request_id="r", prompt=(7, 8, 9), limits=Limits(max_tokens=40, ignore_eos=True))
    plan = given_plans(spec, {1: "1x1x1", 2: "1x2x1"})
    async with fleet(checkpoint, instances=1, plan=plan) as service:
        with (
            agent(service, tmp_path, "guest", service.settings.token) as guest,
            agent(service, tmp_path, "stranger", "guessed") as stranger,
        ):
            layout = await service.wait_event(lambda one: one.data.get("config") == "D1·P2·T1·B8", timeout_s=60.0)
            assert {position["device"] for position in layout.data["positions"]} == {"i0/0", "guest/0"}
            async with service.client() as client:
                delivered = await collect(client, request)
            assert not compare(reference_streams(checkpoint, [request])["r"], delivered)
            assert await stranger.wait(20.0) == 1
            refusal = "the controller refused stranger: wrong join token; take the one of this controller"
            assert stranger.tail(1) == refusal
            async with service.client() as client:
                await client.notify("guest", 20.0)
            assert await guest.wait(30.0) == 0
