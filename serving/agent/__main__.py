"""Entry point of an agent process."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence

from serving import lifeline, settings
from serving.agent.agent import Agent, Dismissed, Identity
from serving.agent.notices.base import Source
from serving.agent.notices.selection import select
from serving.errors import InvalidInput, PerennialError, TransportError


async def _serve(identity: Identity, configuration: settings.ServingSettings, sources: Sequence[Source]) -> int:
    agent = Agent(identity, configuration, sources)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: agent.notice(identity.grace_s, "sigterm"))
    await agent.start()
    try:
        await lifeline.persist(agent.serve, give_up_s=configuration.timeouts.controller_gone_s)
    except Dismissed:
        await agent.stop()
        await agent.release()
        return 0
    finally:
        await agent.stop()
    raise TransportError(f"no controller answers at {identity.controller}; giving up")


def _check(identity: Identity) -> None:
    if not identity.controller.rpartition(":")[2].isdigit():
        raise InvalidInput(f"{identity.controller!r} is not an address; write --controller host:port")
    if identity.devices < 1:
        raise InvalidInput("an instance needs at least one device; write --devices 1 or more")


def main() -> int:
    """Serve until dismissed, or until the controller is gone for good."""
    parser = argparse.ArgumentParser(prog="serving.agent")
    for name in ("settings", "instance", "type", "controller"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--zone", default="", help="where the instance is; copies of its KV are kept elsewhere")
    parser.add_argument("--notices", default="", help="aws, gcp, azure, ray, file:PATH; separated by commas")
    parser.add_argument("--grace-s", type=float, default=30.0, help="left at SIGTERM, or when a source does not say")
    parser.add_argument("--lifeline", action="store_true", help="end when stdin reaches its end")
    arguments = parser.parse_args()
    lifeline.speak()
    if arguments.lifeline:
        lifeline.watch_stdin()
    lifeline.go_first()
    identity = Identity(
        arguments.instance,
        arguments.type,
        arguments.devices,
        arguments.controller,
        arguments.settings,
        arguments.grace_s,
        arguments.zone,
    )
    try:
        _check(identity)
        sources = select(arguments.notices, grace_s=arguments.grace_s)
        return asyncio.run(_serve(identity, settings.load(arguments.settings), sources))
    except PerennialError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
