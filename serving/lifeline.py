"""How processes live: without pauses of their own making, and no longer than their parent or controller."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable

from serving.errors import TransportError

_SWITCH_S = 0.00005
_PR_SET_TIMERSLACK = 29  # of the system's prctl: by how much later than asked for a thread may wake up
_SLACK_NS = 1000  # 50 µs are usual, as much as a wait for the interpreter
_FIRST = -10  # the niceness of who goes first


def watch_stdin() -> None:
    """End this process at once when stdin reaches its end: whoever started it holds the other side."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os._exit(0)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def speak() -> None:
    """Log to stderr, at the level that PERENNIAL_LOG names; SIGUSR1 adds where every thread of this process stands."""
    level, line = os.environ.get("PERENNIAL_LOG", "WARNING"), "%(asctime)s %(levelname)s:%(name)s: %(message)s"
    logging.basicConfig(level=level, stream=sys.stderr, format=line)
    faulthandler.register(signal.SIGUSR1)


def share_the_interpreter() -> None:
    """Let a thread that waits for the interpreter have it sooner than in 5 ms: steps and tokens have many such moments.
    Call it before there are other threads.
    """
    sys.setswitchinterval(_SWITCH_S)
    with contextlib.suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS), 0, 0, 0)


def go_first() -> None:
    """Run before everything else that wants to, where that is permitted; children start as ordinary processes.

    For a process that does next to nothing and must do it in time. Call it before there are threads.
    """
    with contextlib.suppress(OSError, AttributeError):  # not permitted, or not Linux
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, _FIRST)


def settle() -> None:
    """Exempt what is loaded by now from garbage collection: walking it all stops a process for 100 ms."""
    gc.collect()
    gc.freeze()


async def persist(serve: Callable[[], Awaitable[None]], *, give_up_s: float, pause_s: float = 0.2) -> None:
    """Call `serve` again whenever its connection ends; return once it has failed for `give_up_s` in a row.

    `serve` raises `TransportError` if it never came to a connection.
    """
    failing_since = time.monotonic()
    while time.monotonic() - failing_since < give_up_s:
        try:
            await serve()
            failing_since = time.monotonic()
        except TransportError:
            pass
        await asyncio.sleep(pause_s)
