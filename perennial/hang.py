"""One thread of a process that hangs while the process lives on, as in a deadlock. Linux only.

It is stopped as a debugger would, by `ptrace`: no signal is delivered, and no other thread notices.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.errors import PerennialError

_SEIZE, _INTERRUPT, _DETACH = 0x4206, 0x4207, 17
_WALL = 0x40000000  # wait for threads too
_REAP_S = 5.0


class HangRefused(PerennialError):
    """This machine does not let us stop the thread; the message is its reason."""


@contextmanager
def hung(tid: int) -> Iterator[None]:
    """Thread `tid` hangs as long as the block lasts, or until its process is killed.

    Enter and leave it from one thread. A process that is killed meanwhile ends when the block does.
    Raises `HangRefused`.
    """
    _ptrace(_SEIZE, tid)
    try:
        _ptrace(_INTERRUPT, tid)
        yield
    finally:
        with contextlib.suppress(HangRefused):  # it may have been killed
            _ptrace(_DETACH, tid)
        _reap(tid)


def _reap(tid: int) -> None:
    """A thread that ended while it was traced is not gone before its tracer has looked."""
    end = time.monotonic() + _REAP_S
    with contextlib.suppress(ChildProcessError):  # it lives, and is ours no more
        while os.waitpid(tid, os.WNOHANG | _WALL)[0] == 0 and time.monotonic() < end:
            time.sleep(0.005)


def _ptrace(request: int, tid: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.ptrace(request, tid, None, None) == -1:
        raise HangRefused(f"ptrace of thread {tid}: {os.strerror(ctypes.get_errno())}")


def busiest_thread(pid: int, *, within_s: float = 0.3) -> int:
    """The thread of a process, other than its first, that computes most in the time given."""
    before = _computed(pid)
    time.sleep(within_s)
    after = _computed(pid)
    return max(after.keys() - {pid}, key=lambda tid: after[tid] - before.get(tid, 0))


def _computed(pid: int) -> dict[int, int]:
    """Nanoseconds that each thread has computed so far."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0])
    return found
