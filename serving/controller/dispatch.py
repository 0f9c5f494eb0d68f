"""Which request runs on which replica: a queue per model, filled in order, drained to the least loaded."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from data.layout import Device, ParallelConfig
from planning.load import IN_TOKENS, Pace, Server, Work, done_in_s
from serving.controller.records import Record
from serving.requests import GenerationRequest


@dataclass(slots=True, eq=False)
class Replica:
    """A live replica of `model`. `number` is never reused; `config` describes one replica (replicas = 1).

    Replicas on the same devices are a group: they share a step loop, and `kv_share` is its part of the KV memory.
    """

    number: int
    epoch: int
    config: ParallelConfig
    devices: tuple[Device, ...]
    kv_blocks: int
    model: str = ""
    kv_share: float = 1.0
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
    """A queue for every model of requests without a replica, and the replicas they go to.

    `pace` says how quick a replica is.
    """

    def __init__(self, pace: Callable[[Replica], Pace] = lambda replica: IN_TOKENS) -> None:
        self.replicas: dict[int, Replica] = {}
        self._queues: dict[str, deque[Record]] = defaultdict(deque)
        self._pace = pace

    @property
    def waiting(self) -> int:
        """Requests that no replica has yet."""
        return sum(map(len, self._queues.values()))

    def unfinished(self, model: str) -> int:
        """Requests of a model that wait or are with a replica."""
        running = sum(len(replica.records) for replica in self.replicas.values() if replica.model == model)
        return len(self._queues[model]) + running

    @property
    def live(self) -> list[Replica]:
        """Replicas that take requests now."""
        return [replica for replica in self.replicas.values() if replica.serving]

    def hosting(self, model: str) -> list[Replica]:
        """Replicas of a model that take requests now."""
        return [replica for replica in self.live if replica.model == model]

    def enqueue(self, record: Record) -> None:
        """A new request, behind all others of its model."""
        self._queues[record.model].append(record)

    def requeue(self, records: Iterable[Record]) -> None:
        """Requests that lost their replica, before all others and in their order of admission."""
        for record in sorted(records, key=lambda record: record.key, reverse=True):
            record.replica = None
            self._queues[record.model].appendleft(record)

    def assign(self) -> dict[int, list[Record]]:
        """Take from the queues what the replicas have room for, each request to the group with the least work
        outstanding; returns records by replica number.
        """
        assigned: dict[int, list[Record]] = {}
        work_s: dict[tuple[Device, ...], float] = {}
        for model, queue in self._queues.items():
            open_ones = [one for one in self.hosting(model) if one.room > 0] if queue else []
            while queue and open_ones:
                for one in open_ones:
                    if one.devices not in work_s:
                        work_s[one.devices] = self._outstanding_s(one)
                chosen = min(open_ones, key=lambda one: (work_s[one.devices], -one.room, one.number))
                record = queue.popleft()
                work_s[chosen.devices] += self._pace(chosen).device_s(record.work)
                self.bind(record, chosen)
                assigned.setdefault(chosen.number, []).append(record)
                open_ones = [one for one in open_ones if one.room > 0]
        return assigned

    def _outstanding_s(self, replica: Replica) -> float:
        """Seconds of its devices that a group still needs for all that it has."""
        return sum(
            pace.device_s(record.work)
            for one in self.group(replica)
            for pace in [self._pace(one)]
            for record in one.records.values()
        )

    def done_in_s(self, request: GenerationRequest, due_at: float) -> float:
        """In how many seconds a new request, due at `due_at`, would be done at the earliest.

        Models that share a group take turns with it as far as they have requests that are due earlier. 0 where
        nothing is known: no replica takes requests of the model now, or one of unknown pace does.
        """
        hosting = self.hosting(request.model)
        if not hosting or any(self._pace(one) is IN_TOKENS for one in hosting):
            return 0.0
        servers = [
            Server(self._pace_beside_others(one, due_at), tuple(record.work for record in one.records.values()))
            for one in hosting
        ]
        own = Work(len(request.prompt), request.limits.max_tokens)
        return done_in_s(servers, [record.work for record in self._queues[request.model]], own)

    def _pace_beside_others(self, replica: Replica, due_at: float) -> Pace:
        rivals = [
            self._pace(other)
            for other in self.group(replica)
            if other is not replica
            and any(one.deadline_at is not None and one.deadline_at < due_at for one in other.records.values())
        ]
        return self._pace(replica).beside(rivals)

    def group(self, replica: Replica) -> list[Replica]:
        """A replica and those that share its devices."""
        return [other for other in self.replicas.values() if other.devices == replica.devices]

    def bind(self, record: Record, replica: Replica) -> None:
        """`replica` works on `record` from now on."""
        record.replica = replica.number
        record.homes.add(replica.number)
        replica.records[record.key] = record

    def release(self, record: Record) -> Replica | None:
        """`record` has ended and leaves the queue, or the replica that is returned."""
        if record.replica is None:
            with contextlib.suppress(ValueError):
                self._queues[record.model].remove(record)
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
