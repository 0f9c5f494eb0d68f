from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serving.agent.standstill import StandstillWatch, standstill

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells")


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[psutil.Process]:
    """A process whose name is made to mislead."""
    program = tmp_path / "a) T 1 (b"
    program.symlink_to(sys.executable)
    process = subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.communicate()


def until_it_says(pid: int, reason: str) -> None:
    end = time.monotonic() + 5.0
    while standstill(pid) != reason:
        assert time.monotonic() < end, standstill(pid)
        os.sched_yield()


def test_what_the_kernel_says_of_a_process(sleeper: psutil.Process) -> None:
    assert standstill(sleeper.pid) == ""
    sleeper.suspend()
    until_it_says(sleeper.pid, "is stopped")
    sleeper.resume()
    until_it_says(sleeper.pid, "")
    sleeper.kill()
    until_it_says(sleeper.pid, "is ending")  # nobody has reaped it
    assert standstill(os.getpid()) == ""


def test_no_such_process() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert standstill(ended.pid) == ""


def test_a_watch_says_it_once_and_only_of_what_lasts(sleeper: psutil.Process) -> None:
    watch, pids = StandstillWatch(), {3: sleeper.pid}
    assert list(watch.look(pids)) == []
    for _ in range(2):
        sleeper.suspend()
        until_it_says(sleeper.pid, "is stopped")
        assert list(watch.look(pids)) == []
        sleeper.resume()
        until_it_says(sleeper.pid, "")
        assert list(watch.look(pids)) == []
    sleeper.suspend()
    until_it_says(sleeper.pid, "is stopped")
    found = [list(watch.look(pids)) for _ in range(4)]
    assert found == [[], [(3, sleeper.pid, "is stopped")], [], []]
