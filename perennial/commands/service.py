"""Finding and calling the service that a command is about."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from data.errors import PerennialError

if TYPE_CHECKING:
    from serving.api.client import Client

_Result = TypeVar("_Result")
_GIVE_UP_S = 10.0

Address = Annotated[
    str, typer.Option("--address", help="host:port of the service; by default the one that runs in this home.")
]


def service_address(given: str) -> str:
    """The address given, set by `PERENNIAL_ADDRESS`, or left by `perennial serve` in this home."""
    from perennial.fleet import read_ready
    from perennial.settings import load_settings

    settings = load_settings()
    if given or settings.address:
        return given or settings.address
    try:
        return read_ready(settings.ready_file)["grpc"]
    except (OSError, ValueError, KeyError) as error:
        raise PerennialError(
            f"no service runs in {settings.home}; start one with `perennial serve`, or name one with --address"
        ) from error


def call(address: str, work: Callable[[Client], Awaitable[_Result]]) -> _Result:
    """Run `work` with a client of the service."""
    target = service_address(address)

    async def run() -> _Result:
        from serving.api.client import Client

        async with Client(target, give_up_s=_GIVE_UP_S) as client:
            return await work(client)

    return asyncio.run(run())
