"""Process groups of this machine: started together, killed together, and looked for afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import Signals
from typing import IO, Protocol

import psutil

_POLL_S = 0.05


class Process(Protocol):
    """What a group needs of its leader; `subprocess.Popen` is one."""

    @property
    def pid(self) -> int:
        """Its id, and that of its session."""

    @property
    def stdin(self) -> IO[bytes] | None:
        """The lifeline."""

    def poll(self) -> int | None:
        """The exit code; None while it runs."""

    def send_signal(self, sig: int, /) -> None:
        """Send a signal."""


class Start(Protocol):
    """Starts a command in a session of its own, with a pipe as stdin."""

    def __call__(self, command: Sequence[str], output: IO[bytes], environment: Mapping[str, str], /) -> Process:
        """`environment` is added to that of this process."""


def start_command(command: Sequence[str], output: IO[bytes], environment: Mapping[str, str]) -> Process:
    """Start a command as a new process."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=True,
        env={**os.environ, **environment},
    )


class ProcessGroup:
    """A command in its own session, so that one signal reaches it and all its children.

    Its stdin is a pipe that ends with this process (the lifeline); its output goes to `log`.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        start: Start = start_command,
    ) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            self._process = start(command, output, environment or {})

    @property
    def pid(self) -> int:
        """Process id of the leader, which is the id of the group."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """How the leader ended; None while it runs."""
        return self._process.poll()

    @property
    def alive(self) -> bool:
        """Whether the leader runs (a stopped one does too)."""
        return self.returncode is None

    def signal(self, number: Signals) -> None:
        """Send a signal to every process of the group; nothing happens if there is none."""
        self._process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def signal_leader(self, number: Signals) -> None:
        """Send a signal to the leader only."""
        if self.alive:
            self._process.send_signal(number)

    def cut_lifeline(self) -> None:
        """Close the pipe: the group is to end by itself."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def tail(self, lines: int = 5) -> str:
        """The last lines of the log."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])

    async def wait(self, timeout_s: float) -> int | None:
        """Wait for the leader's end; None if it is still there after `timeout_s`."""
        end = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < end:  # noqa: ASYNC110  another process cannot set an event
            await asyncio.sleep(_POLL_S)
        return self.returncode


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this project with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def living(groups: Sequence[int]) -> list[psutil.Process]:
    """Processes that belong to one of the groups and are not merely waiting to be reaped."""
    wanted, found = set(groups), []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) in wanted and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


async def gone(groups: Sequence[int], timeout_s: float) -> list[psutil.Process]:
    """Wait until nothing lives in the groups; returns what is still there after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while (left := living(groups)) and time.monotonic() < end:  # noqa: ASYNC110  as above
        await asyncio.sleep(_POLL_S)
    return left
