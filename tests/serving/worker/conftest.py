from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import msgspec
import pytest

from serving.controller.rendezvous import Rendezvous
from tests.serving.worker.member import Outcome, Task

SIZE = 3


class Members:
    """Three processes that carry out tasks together; those that were killed are started again."""

    def __init__(self) -> None:
        self._prefixes = count()
        self.processes = [self._start() for _ in range(SIZE)]

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.serving.worker.member"]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(
        self,
        store: Rendezvous,
        tasks: Mapping[int, tuple[str, dict[str, Any]]],
        *,
        size: int = SIZE,
        timeout_s: float = 10.0,
    ) -> None:
        """Give each rank its task."""
        prefix = f"group{next(self._prefixes)}"
        for rank, (name, options) in tasks.items():
            task = Task(
                name=name,
                store=store.address,
                prefix=prefix,
                rank=rank,
                size=size,
                timeout_s=timeout_s,
                options=options,
            )
            stdin = self.processes[rank].stdin
            assert stdin is not None
            stdin.write(msgspec.json.encode(task).decode() + "\n")
            stdin.flush()

    def outcome(self, rank: int) -> Outcome:
        """What became of the task of a rank."""
        stdout = self.processes[rank].stdout
        assert stdout is not None
        return msgspec.json.decode(stdout.readline(), type=Outcome)

    def all_do(self, name: str, **options: Any) -> list[Outcome]:
        """The same task for everybody, in a store of its own."""
        store = Rendezvous("127.0.0.1", 10.0)
        self.begin(store, dict.fromkeys(range(SIZE), (name, options)))
        outcomes = [self.outcome(rank) for rank in range(SIZE)]
        store.close()
        return outcomes

    def replace(self, rank: int) -> None:
        """End a member and start another one in its place."""
        self._end(self.processes[rank])
        self.processes[rank] = self._start()

    def _end(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait(5.0)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def end(self) -> None:
        for process in self.processes:
            self._end(process)


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    three = Members()
    yield three
    three.end()
