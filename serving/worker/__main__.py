"""Entry point of a worker process; started by its agent."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from serving import lifeline, settings
from serving.errors import PerennialError
from serving.worker.worker import Worker


async def _serve(arguments: argparse.Namespace) -> None:
    configuration = settings.load(arguments.settings)
    worker = Worker(configuration, arguments.instance, arguments.index)
    lifeline.settle()
    await lifeline.persist(
        lambda: worker.serve(arguments.controller, pid=os.getpid()),
        give_up_s=configuration.timeouts.controller_gone_s,
    )


def main() -> int:
    """Serve until the controller is gone for good or the agent ends."""
    parser = argparse.ArgumentParser(prog="serving.worker")
    for name in ("settings", "instance", "controller"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--index", type=int, required=True)
    arguments = parser.parse_args()
    lifeline.speak()
    lifeline.share_the_interpreter()
    lifeline.watch_stdin()
    try:
        asyncio.run(_serve(arguments))
    except PerennialError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    # Threads may be stuck in a collective whose peers are gone; nothing of this process is worth waiting for.
    os._exit(code)
