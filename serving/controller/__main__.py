"""Entry point of the controller process."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from serving import lifeline, settings
from serving.api import server
from serving.controller.controller import Controller
from serving.errors import PerennialError
from serving.telemetry import serve_metrics


def _announce(path: str, addresses: dict[str, str | int]) -> None:
    """Write the ready file in one step: a reader sees all of it or nothing."""
    partial = Path(f"{path}.{os.getpid()}")
    partial.write_text(json.dumps(addresses))
    partial.replace(path)


async def _serve(configuration: settings.ServingSettings) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as stack:
        controller, control_port = await Controller.open(configuration)
        stack.push_async_callback(controller.close)
        host = configuration.host
        api, grpc_port = await server.start(
            controller, host=host, port=configuration.grpc_port, message_bytes=configuration.capacity.message_bytes
        )
        stack.push_async_callback(api.stop, 1.0)
        metrics = serve_metrics(controller.metrics.registry, host, configuration.metrics_port)
        stack.callback(metrics.close)
        lifeline.settle()
        if configuration.ready_file:
            addresses = {"grpc": grpc_port, "control": control_port, "metrics": metrics.port}
            ready = {name: f"{host}:{port}" for name, port in addresses.items()}
            _announce(configuration.ready_file, {**ready, "pid": os.getpid()})
        await stopping.wait()


def main() -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="serving.controller")
    parser.add_argument("--settings", required=True)
    parser.add_argument("--lifeline", action="store_true", help="end when stdin reaches its end")
    arguments = parser.parse_args()
    lifeline.speak()
    lifeline.share_the_interpreter()
    if arguments.lifeline:
        lifeline.watch_stdin()
    try:
        asyncio.run(_serve(settings.load(arguments.settings)))
    except PerennialError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
