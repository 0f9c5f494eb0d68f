from __future__ import annotations

import contextlib
import random
import time
import weakref
from datetime import timedelta
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from serving.worker import window
from serving.worker.groups import GroupBroken
from serving.worker.peer_memory import PeerMemory
from serving.worker.rounds import Rounds, Traffic
from serving.worker.window import Lane, Windows
from tests.serving.worker.lanes import SLOT_BYTES, SharedMemory, everyone, meet

LARGEST = 160  # what exceeds a slot goes the other way


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


def test_an_exchange_ends_whatever_each_side_has_to_say() -> None:
    groups, draw = meet(2), random.Random(1)
    for counts in [(0, 1), (1, 0), (20, 3), (3, 20), (7, 7), (0, 0), (2, 0)]:
        queues = [[(draw.randrange(1000), draw.randint(1, LARGEST // 8)) for _ in range(n)] for n in counts]
        cargo = [Numbers(), Numbers()]
        traffic: list[Traffic] = [Traffic(), Traffic()]

        def exchange(rank: int) -> None:
            rounds = Rounds(groups[rank], cargo[rank])  # noqa: B023 - joined within the loop
            traffic[rank] = rounds.run({1 - rank: queues[rank]}, {1 - rank: queues[1 - rank]})  # noqa: B023

        everyone(2, exchange)
        for rank in range(2):
            assert cargo[rank].stored == [first for first, _ in queues[1 - rank]]
            assert traffic[rank].sent_bytes == traffic[1 - rank].received_bytes == 8 * sum(n for _, n in queues[rank])


@pytest.mark.parametrize(("apart", "direct", "largest"), [((), True, SLOT_BYTES), ((0, 2), False, LARGEST)])
def test_all_ranks_cut_messages_alike(apart: tuple[int, ...], direct: bool, largest: int) -> None:
    groups = meet(3, apart=apart)
    assert [group.direct for group in groups] == [direct] * 3
    assert [group.message_bytes(LARGEST) for group in groups] == [largest] * 3
    cargo = [Numbers() for _ in groups]

    def exchange(rank: int) -> None:
        chunks = {peer: [(10 * rank, largest // 8), (rank, 2)] for peer in range(3) if peer != rank}
        Rounds(groups[rank], cargo[rank]).run(
            chunks, {peer: [(10 * peer, largest // 8), (peer, 2)] for peer in range(3) if peer != rank}
        )

    everyone(3, exchange)
    for rank in range(3):
        assert sorted(cargo[rank].stored) == sorted(n * peer for n in (1, 10) for peer in range(3) if peer != rank)


def test_what_arrives_after_an_abort_is_not_stored() -> None:
    """Its place may be somebody else's by then."""
    groups, cargo = meet(2), [Numbers(), Numbers()]
    groups[1].abort()

    def exchange(rank: int) -> None:
        with pytest.raises(GroupBroken) if rank else contextlib.nullcontext():
            chunks = {1 - rank: [(5, 3)]}
            Rounds(groups[rank], cargo[rank]).run({} if rank else chunks, chunks if rank else {})
        if rank:
            groups[rank].flush()  # so that the sender need not wait for its timeout

    everyone(2, exchange)
    assert not cargo[1].stored


class Shared(Windows):
    """Windows in the memory of this process; what opens one is remembered."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), 3 * 4096)
        self.opened: list[weakref.ref[SharedMemory]] = []

    def memory(self) -> PeerMemory:
        memory = SharedMemory()
        self.opened.append(weakref.ref(memory))
        return cast(PeerMemory, memory)

    @property
    def open(self) -> int:
        return sum(one() is not None for one in self.opened)


@pytest.mark.parametrize("used", [False, True])
def test_the_window_of_a_lost_peer_is_closed_later_and_never_under_a_lane(
    monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    """To close it may take as long as the device hangs: whoever meets next must not wait for that."""
    monkeypatch.setattr(window, "_CLOSED_S", 0.2)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    windows = [Shared(), Shared()]
    lanes: list[dict[int, Lane]] = [{}, {}]

    def met(rank: int) -> None:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=10))
        lanes[rank] = windows[rank].meet(dist.PrefixStore("first", own), None, rank, 2)

    everyone(2, met)
    assert [list(found) for found in lanes] == [[1], [0]]
    if not used:
        lanes[0].clear()
    assert windows[0].meet(dist.PrefixStore("alone", store), None, 0, 1) == {}
    assert windows[0].open == 1, "not while somebody meets"
    time.sleep(0.4)
    assert windows[0].open == used
    lanes[0].clear()
    assert windows[0].open == 0
