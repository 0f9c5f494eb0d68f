"""Several machines on one: network namespaces on a bridge whose links can be cut. Linux, and root, only.

    with Network() as network:
        host = network.add_host()
        network.cut(host)     # its packets get lost; no connection is closed
        network.mend(host)

A namespace lives as long as the process that holds it, which ends with this one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

from serving.errors import PerennialError

_TIMEOUT_S = 10.0


class NetworkRefused(PerennialError):
    """This machine does not let us have networks of our own; the message is its reason."""


@dataclass(frozen=True, slots=True)
class Host:
    """A machine of the network: its address, the command prefix that runs something there, its cable."""

    address: str
    enter: tuple[str, ...]
    cable: str


class Network:
    """A bridge that has the address `address` on this machine, and the hosts on it.

    Raises `NetworkRefused` without the tools or the right to make one.
    """

    def __init__(self) -> None:
        self._bridge = f"pb{os.getpid()}"
        self._subnet = next(_free_subnets())
        self.address = f"{self._subnet}.1"
        self._holders: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Network:
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("address", "add", f"{self.address}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except NetworkRefused:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the network down; the processes of its hosts should have ended."""
        for holder in self._holders:
            holder.communicate(timeout=_TIMEOUT_S)
        with contextlib.suppress(NetworkRefused):
            _ip("link", "delete", self._bridge)

    def add_host(self) -> Host:
        """A new machine, connected."""
        number = len(self._holders) + 2
        holder = _hold_namespace()
        self._holders.append(holder)
        inside = ("nsenter", f"--net=/proc/{holder.pid}/ns/net")
        host = Host(f"{self._subnet}.{number}", inside, f"pc{number}x{os.getpid()}")
        _ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        _ip("address", "add", f"{host.address}/24", "dev", "eth0", inside=inside)
        for interface in ("lo", "eth0"):
            _ip("link", "set", interface, "up", inside=inside)
        _ip("link", "set", host.cable, "up")
        self.mend(host)
        return host

    def cut(self, host: Host) -> None:
        """From now on everything between this host and all others gets lost."""
        _ip("link", "set", host.cable, "nomaster")

    def mend(self, host: Host) -> None:
        """Undo a cut."""
        _ip("link", "set", host.cable, "master", self._bridge)


def _hold_namespace() -> subprocess.Popen[bytes]:
    """A process in a network namespace of its own; it says when it is there and ends with its stdin."""
    command = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    try:
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        raise NetworkRefused(f"cannot run unshare: {error.strerror}") from error
    assert holder.stdout is not None
    if holder.stdout.readline() != b"\n":
        _, reason = holder.communicate(timeout=_TIMEOUT_S)
        raise NetworkRefused(reason.decode().strip())
    return holder


def _ip(*arguments: str, inside: tuple[str, ...] = ()) -> None:
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        raise NetworkRefused("the commands ip (iproute2) and nsenter (util-linux) are needed")
    done = subprocess.run([*inside, "ip", *arguments], check=False, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        raise NetworkRefused(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _free_subnets() -> Iterator[str]:
    """Private networks of 254 addresses whose first one this machine does not have."""
    for number in itertools.count(os.getpid()):
        subnet = f"10.213.{number % 250 + 1}"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.bind((f"{subnet}.1", 0))
            continue
        yield subnet
