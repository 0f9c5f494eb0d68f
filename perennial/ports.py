"""Ports for services that have to be found again at the same one, also after a restart."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path

_LOWEST = 10_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FEW = 1_000  # ports to choose from: with fewer, any port that is free now has to do
_TRIES = 100


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing uses now, and that the system gives to no outgoing connection.

    One from the system's own range could be taken by any connection that is made before the service
    listens, or while it is being restarted.
    """
    beyond = _first_outgoing()
    if beyond - _LOWEST >= _FEW:
        for _ in range(_TRIES):
            with suppress(OSError):
                return _bound(host, random.randrange(_LOWEST, beyond))
    return _bound(host, 0)


def _bound(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.bind((host, port))
        return int(probe.getsockname()[1])


def _first_outgoing() -> int:
    """Where the system's range for outgoing connections begins; 0 if that is not known."""
    try:
        return int(_RANGE.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        return 0
