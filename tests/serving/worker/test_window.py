from __future__ import annotations

import contextlib
import random
import threading
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from serving.worker.groups import Group, GroupBroken
from serving.worker.rounds import Rounds, Traffic
from serving.worker.window import Lane, Windows

SLOT_BYTES, LARGEST = 64, 160  # what exceeds a slot goes the other way


class Shared:
    """In place of `Windows`: both ends are in this process, and so is the memory that they read of each other."""

    def __init__(self, rank: int, windows: list[list[Tensor]]) -> None:
        self._rank, self._windows = rank, windows

    def meet(self, store: dist.Store, gloo: Any, rank: int, size: int) -> dict[int, Lane]:
        own, theirs = self._windows[rank], self._windows[1 - rank]
        return {1 - rank: Lane(gloo, 1 - rank, list(enumerate(own)), theirs)}


@pytest.fixture
def groups() -> list[Group]:
    """Both ranks of a group that exchanges by windows of three slots."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    windows = [[torch.zeros(SLOT_BYTES, dtype=torch.uint8) for _ in range(3)] for _ in range(2)]
    found: list[Any] = [None, None]

    def meet(rank: int) -> None:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=10))
        shared, cpu = cast(Windows, Shared(rank, windows)), torch.device("cpu")
        found[rank] = Group(own, "g", rank, 2, device=cpu, host="127.0.0.1", timeout_s=10.0, windows=shared)

    both(meet)
    return found


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


def test_an_exchange_ends_whatever_each_side_has_to_say(groups: list[Group]) -> None:
    draw = random.Random(1)
    for counts in [(0, 1), (1, 0), (20, 3), (3, 20), (7, 7), (0, 0), (2, 0)]:
        queues = [[(draw.randrange(1000), draw.randint(1, LARGEST // 8)) for _ in range(n)] for n in counts]
        cargo = [Numbers(), Numbers()]
        traffic: list[Traffic] = [Traffic(), Traffic()]

        def exchange(rank: int) -> None:
            rounds = Rounds(groups[rank], cargo[rank])  # noqa: B023 - joined within the loop
            traffic[rank] = rounds.run({1 - rank: queues[rank]}, {1 - rank: queues[1 - rank]})  # noqa: B023

        both(exchange)
        for rank in range(2):
            assert cargo[rank].stored == [first for first, _ in queues[1 - rank]]
            assert traffic[rank].sent_bytes == traffic[1 - rank].received_bytes == 8 * sum(n for _, n in queues[rank])


def test_messages_are_as_large_as_slots(groups: list[Group]) -> None:
    assert [group.direct for group in groups] == [True, True]
    assert [group.message_bytes(1 << 20) for group in groups] == [SLOT_BYTES] * 2


def test_what_arrives_after_an_abort_is_not_stored(groups: list[Group]) -> None:
    """Its place may be somebody else's by then."""
    cargo = [Numbers(), Numbers()]
    groups[1].abort()

    def exchange(rank: int) -> None:
        with pytest.raises(GroupBroken) if rank else contextlib.nullcontext():
            chunks = {1 - rank: [(5, 3)]}
            Rounds(groups[rank], cargo[rank]).run({} if rank else chunks, chunks if rank else {})
        if rank:
            groups[rank].flush()  # so that the sender need not wait for its timeout

    both(exchange)
    assert not cargo[1].stored
