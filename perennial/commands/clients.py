"""`perennial generate`, `notify`, `status` and `drain`: what users and operators ask of a service."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from perennial.commands.service import Address, call

if TYPE_CHECKING:
    from serving.api.client import Client
    from serving.requests import ServerInfo


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (generate, notify, status, drain):
        app.command()(command)


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; `-` reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 does not cut.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    model: Annotated[str, typer.Option(help="Which one, where several are served.")] = "",
    deadline: Annotated[float | None, typer.Option(help="Seconds until the answer must be complete.")] = None,
    request_id: Annotated[str, typer.Option(help="Name of the request, to come back to it.")] = "",
    resume_from: Annotated[int | None, typer.Option(help="Attach to --request-id from this output token on.")] = None,
    address: Address = "",
) -> None:
    """Stream a completion; a lost connection is taken up again where it broke."""
    from data.errors import InvalidInput
    from serving.requests import Limits, Sampling

    if resume_from is not None and not request_id:
        raise InvalidInput("--resume-from needs the --request-id of a request that was sent before")
    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    limits = Limits(max_tokens=max_tokens, stop=tuple(stop or ()))

    async def run(client: Client) -> None:
        chunks = (
            client.attach(request_id, resume_from)
            if resume_from is not None
            else client.stream(
                text, sampling=sampling, limits=limits, request_id=request_id, deadline_s=deadline, model=model
            )
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                typer.echo(chunk.text, nl=False)
        typer.echo()

    call(address, run)


def notify(
    instance: Annotated[str, typer.Argument(help="Name of the instance, as `perennial status` shows it.")],
    seconds: Annotated[float, typer.Argument(min=0.0, help="Seconds until it is gone.")],
    address: Address = "",
) -> None:
    """Tell the service that an instance will be gone."""
    call(address, lambda client: client.notify(instance, seconds, "cli"))
    Console().print(f"{instance} is leaving within {seconds:g} s")


def status(address: Address = "") -> None:
    """Show what is being served, by whom, right now."""
    _print_status(call(address, lambda client: client.server_info()))


def drain(
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for running requests.")] = 30.0,
    address: Address = "",
) -> None:
    """Refuse new requests and wait for the running ones."""
    with Console(stderr=True).status("waiting for running requests"):
        left = call(address, lambda client: client.drain(timeout))
    Console().print("drained" if not left else f"{left} requests were still running after {timeout:g} s")
    if left:
        raise typer.Exit(1)


def _print_status(info: ServerInfo) -> None:
    console = Console()
    names = ", ".join(f"{one.name} ({one.replicas})" for one in info.models) if len(info.models) > 1 else info.model
    console.print(f"[bold]{names}[/bold] {info.state}, epoch {info.epoch}, {info.config or 'no layout in force'}")
    version = f" version {info.plan_version}" if info.plan_version else ""
    console.print(f"plan {info.plan_source}{version} ({info.plan_sha256[:12]})")
    console.print(f"{info.running} running, {info.waiting} waiting, KV {info.kv_usage:.0%} in use")
    zoned = any(one.zone for one in info.instances)
    table = Table("instance", "type", *["zone"] * zoned, "state", "positions")
    for one in info.instances:
        held = [
            f"{position.model}{':' if position.model else ''}r{position.replica}·p{position.stage}·t{position.shard}"
            for position in info.positions
            if position.device.rpartition("/")[0] == one.instance
        ]
        leaving = f" ({one.leaving_s:.1f} s left)" if one.leaving_s is not None else ""
        zone = [one.zone] if zoned else []
        table.add_row(one.instance, one.type, *zone, f"{one.state}{leaving}", ", ".join(held) or "spare")
    console.print(table)
