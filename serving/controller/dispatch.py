"""Which request runs on which replica: one queue, filled in order, drained to the least loaded."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from data.layout import Device, ParallelConfig
from serving.controller.records import Record


@dataclass(slots=True, eq=False)
class Replica:
    """A live replica. `number` is never reused; `config` describes one replica (replicas = 1)."""

    number: int
    epoch: int
    config: ParallelConfig
    devices: tuple[Device, ...]
    kv_blocks: int
    serving: bool = True  # False from the pause of a reconfiguration on
    records: dict[int, Record] = field(default_factory=dict)
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0

    @property
    def leader(self) -> Device:
        """The device whose worker schedules."""
        return self.devices[0]

    @property
    def room(self) -> int:
        """How many more requests it takes: a small backlog keeps its batch full."""
        most = self.config.max_batch + max(1, self.config.max_batch // 4)
        return most - len(self.records) if self.serving else 0


class Dispatcher:
    """The queue of requests without a replica, and the replicas they go to."""

    def __init__(self) -> None:
        self.replicas: dict[int, Replica] = {}
        self._queue: deque[Record] = deque()

    @property
    def waiting(self) -> int:
        """Requests that no replica has yet."""
        return len(self._queue)

    @property
    def unfinished(self) -> int:
        """Requests that wait or are with a replica."""
        return len(self._queue) + sum(len(replica.records) for replica in self.replicas.values())

    @property
    def live(self) -> list[Replica]:
        """Replicas that take requests now."""
        return [replica for replica in self.replicas.values() if replica.serving]

    def enqueue(self, record: Record) -> None:
        """A new request, behind all others."""
        self._queue.append(record)

    def requeue(self, records: Iterable[Record]) -> None:
        """Requests that lost their replica, before all others and in their order of admission."""
        for record in sorted(records, key=lambda record: record.key, reverse=True):
            record.replica = None
            self._queue.appendleft(record)

    def assign(self) -> dict[int, list[Record]]:
        """Take from the queue what the replicas have room for; returns records by replica number."""
        assigned: dict[int, list[Record]] = {}
        while self._queue:
            replica = max(self.live, key=lambda one: (one.room, -one.number), default=None)
            if replica is None or replica.room <= 0:
                break
            record = self._queue.popleft()
            self.bind(record, replica)
            assigned.setdefault(replica.number, []).append(record)
        return assigned

    def bind(self, record: Record, replica: Replica) -> None:
        """`replica` works on `record` from now on."""
        record.replica = replica.number
        record.homes.add(replica.number)
        replica.records[record.key] = record

    def release(self, record: Record) -> Replica | None:
        """`record` has ended and leaves the queue, or the replica that is returned."""
        if record.replica is None:
            with contextlib.suppress(ValueError):
                self._queue.remove(record)
            return None
        replica = self.replicas.get(record.replica)
        if replica is not None:
            replica.records.pop(record.key, None)
        return replica

    def drop(self, numbers: Iterable[int]) -> list[Record]:
        """Forget replicas; returns the requests that they leave behind."""
        left: list[Record] = []
        for number in numbers:
            replica = self.replicas.pop(number, None)
            if replica is not None:
                left += [record for record in replica.records.values() if record.finish is None]
        return left
