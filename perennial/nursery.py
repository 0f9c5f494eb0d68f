"""Starts the processes of many fleets by forking one that has imported everything already.

Importing torch takes more processor time than most test fleets use in their whole life. What runs in a
forked process is the same `main` as after `python -m`; only the interpreter's start is not repeated.
Linux only. A fleet takes `Nursery.start` instead of starting interpreters.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from perennial.processes import python_module
from serving.agent.environment import worker_environment

_MODULES = ("serving.controller.__main__", "serving.agent.__main__", "serving.worker.__main__")
_MESSAGE_BYTES = 1 << 16
_START_S = 120.0
_ANSWER_S = 20.0


class ForkedProcess:
    """A process that the nursery forked; the part of `Popen` that a `ProcessGroup` uses."""

    def __init__(self, pid: int, stdin: IO[bytes], end: socket.socket) -> None:
        self.pid, self.stdin = pid, stdin
        end.setblocking(False)
        self._end = end.detach()
        self._code: int | None = None
        weakref.finalize(self, os.close, self._end)  # the end of a process is not always waited for

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        if self._code is None:
            with contextlib.suppress(BlockingIOError):
                self._code = int(os.read(self._end, 64) or b"-9")  # a nursery that ended took its children along
        return self._code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Nursery:
    """The process that forks; use it as a context."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._address = folder, str(folder / "nursery.sock")

    def __enter__(self) -> Nursery:
        with open(self._folder / "nursery.log", "ab") as log:
            command = python_module("perennial.nursery", self._address)
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, env=worker_environment())
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _START_S)[0] or not self._process.stdout.read(1):
            self.__exit__()
            raise OSError(f"the nursery did not start; see {self._folder / 'nursery.log'}")
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(_ANSWER_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def start(self, command: Sequence[str], output: IO[bytes], environment: Mapping[str, str]) -> ForkedProcess:
        """Fork `python -m module arguments…` as the leader of a session of its own. Raises `OSError`."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lifeline, end = os.pipe()
        try:
            connection.settimeout(_ANSWER_S)
            connection.connect(self._address)
            order = json.dumps({"command": list(command[2:]), "environment": dict(environment)}).encode()
            socket.send_fds(connection, [order], [lifeline, output.fileno()])
            pid = int(connection.recv(64) or b"0")
        finally:
            os.close(lifeline)
        if not pid:
            raise OSError("the nursery has ended")
        return ForkedProcess(pid, os.fdopen(end, "wb", buffering=0), connection)


def serve(address: str) -> None:
    """Fork on request until stdin ends; then nothing that was forked stays."""
    for module in _MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()
    children: dict[int, tuple[int, socket.socket]] = {}  # pidfd → (pid, whoever wants to know of its end)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(64)
        os.write(1, b"!")
        while True:
            watched = [0, listener.fileno(), *children]
            ready, _, _ = select.select(watched, [], [])
            if 0 in ready:
                break
            if listener.fileno() in ready:
                _take_order(listener, children)
            for handle in children.keys() & set(ready):
                _report_end(handle, *children.pop(handle))
    for pid, _ in children.values():
        _end(pid)


def _end(pid: int) -> None:
    """Kill a session that was forked, or a process that has not come to lead one yet."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _take_order(listener: socket.socket, children: dict[int, tuple[int, socket.socket]]) -> None:
    connection, _ = listener.accept()
    order, handles, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 2)
    if len(handles) < 2:  # whoever asked is gone
        connection.close()
        return
    pid = os.fork()
    if not pid:
        os.setsid()
        wanted = json.loads(order)
        os.environ.update(wanted["environment"])
        run_forked(wanted["command"], handles[0], handles[1])
    for handle in handles:
        os.close(handle)
    with contextlib.suppress(OSError):
        connection.send(b"%d" % pid)
    children[os.pidfd_open(pid)] = pid, connection


def _report_end(handle: int, pid: int, connection: socket.socket) -> None:
    _, status = os.waitpid(pid, 0)
    os.close(handle)
    with contextlib.suppress(OSError), connection:
        connection.send(b"%d" % os.waitstatus_to_exitcode(status))


def run_forked(command: Sequence[str], stdin: int, output: int) -> None:
    """In a fresh fork: become `command` (a module and its arguments) with these descriptors; never returns."""
    code = 1
    try:
        _let_go(stdin, output)
        sys.argv = list(command)
        module = importlib.import_module(f"{command[0]}.__main__")
        if command[0] == "serving.agent":
            vars(module)["Agent"] = _forking_agent()
        code = module.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - what is above this frame belongs to the parent
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _let_go(stdin: int, output: int) -> None:
    """Keep nothing of the parent: neither its descriptors nor its handlers, nor garbage that would close ours."""
    gc.freeze()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for place, handle in enumerate((stdin, output, output)):
        os.dup2(handle, place)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))


def _forking_agent() -> type[Any]:
    """The agent, with workers that are forks of itself."""
    from serving.agent.agent import Agent

    class ForkingAgent(Agent):
        async def _spawn(self, index: int) -> Any:
            identity = self._identity
            command = ["serving.worker", "--settings", identity.settings_file, "--instance", identity.instance]
            command += ["--index", str(index), "--controller", identity.controller]
            stdin, lifeline = os.pipe()
            pid = os.fork()
            if not pid:
                run_forked(command, stdin, 2)
            os.close(stdin)
            return _ForkedWorker(pid, lifeline)

    return ForkingAgent


class _ForkedWorker:
    """The part of asyncio's subprocess that an agent uses."""

    def __init__(self, pid: int, lifeline: int) -> None:
        self.pid, self.returncode = pid, None
        self._lifeline = lifeline
        self._ended = asyncio.ensure_future(asyncio.to_thread(os.waitpid, pid, 0))

    async def wait(self) -> int:
        _, status = await asyncio.shield(self._ended)
        self._let_lifeline_go()
        return os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        if self._ended.done():
            raise ProcessLookupError
        os.kill(self.pid, signal.SIGKILL)

    def _let_lifeline_go(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


if __name__ == "__main__":
    serve(sys.argv[1])
    sys.exit(0)
