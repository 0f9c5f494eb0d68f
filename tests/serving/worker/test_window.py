from __future__ import annotations

import random
import threading
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from serving.worker.groups import Exchange, Group
from serving.worker.rounds import Rounds, Traffic
from serving.worker.window import Lane

SLOT_BYTES = 64


@pytest.fixture
def lanes() -> list[Lane]:
    """Both ends of one lane, its windows in the memory that this process shares with itself."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    found: list[Any] = [None, None]

    def meet(rank: int) -> None:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=10))
        backend: Any = dist.ProcessGroupGloo
        options = backend._Options()
        options._timeout = timedelta(seconds=10)
        options._devices = [backend.create_device(hostname="127.0.0.1")]
        found[rank] = backend(dist.PrefixStore("lane", own), rank, 2, options)

    both(meet)
    windows = [[torch.zeros(SLOT_BYTES, dtype=torch.uint8) for _ in range(3)] for _ in range(2)]
    return [Lane(found[rank], 1 - rank, list(enumerate(windows[rank])), windows[1 - rank]) for rank in range(2)]


def both(work: Any) -> None:
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert not any(thread.is_alive() for thread in threads), "an end of the lane waits for ever"
    if failures:
        raise failures[0]


class Direct:
    """The part of a `Group` that an exchange needs, over one lane."""

    direct, device = True, torch.device("cpu")

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def begin_exchange(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> Exchange:
        for tensor, _ in sends:
            self._lane.post(tensor)
        return Exchange(cast(Group, self), [], receives)

    def end_exchange(self, tensor: Tensor, peer: int) -> None:
        self._lane.fetch(tensor)

    def flush(self) -> None:
        self._lane.flush()

    def check(self) -> None:
        pass


class Numbers:
    """Chunks are (first number, how many)."""

    def __init__(self) -> None:
        self.stored: list[int] = []

    def load(self, chunk: tuple[int, int]) -> Tensor:
        return torch.arange(chunk[0], chunk[0] + chunk[1])

    def buffer(self, chunk: tuple[int, int]) -> Tensor:
        return torch.empty(chunk[1], dtype=torch.int64)

    def store(self, chunk: tuple[int, int], data: Tensor) -> None:
        assert torch.equal(data, self.load(chunk))
        self.stored.append(chunk[0])


def test_an_exchange_ends_whatever_each_side_has_to_say(lanes: list[Lane]) -> None:
    draw = random.Random(1)
    for counts in [(0, 1), (1, 0), (20, 3), (3, 20), (7, 7), (0, 0), (2, 0)]:
        queues = [[(draw.randrange(1000), draw.randint(1, SLOT_BYTES // 8)) for _ in range(n)] for n in counts]
        cargo = [Numbers(), Numbers()]
        traffic: list[Traffic] = [Traffic(), Traffic()]

        def exchange(rank: int) -> None:
            rounds = Rounds(cast(Group, Direct(lanes[rank])), cargo[rank])  # noqa: B023 - joined within the loop
            traffic[rank] = rounds.run({1 - rank: queues[rank]}, {1 - rank: queues[1 - rank]})  # noqa: B023

        both(exchange)
        for rank in range(2):
            assert cargo[rank].stored == [first for first, _ in queues[1 - rank]]
            assert traffic[rank].sent_bytes == traffic[1 - rank].received_bytes == 8 * sum(n for _, n in queues[rank])
