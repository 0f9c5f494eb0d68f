"""Which communicators are used again. Their backends are stand-ins: none runs without GPUs, and none is called here."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from serving.worker.communicators import Communicator, Communicators

MEMBERS = ("a/0", "b/0")


class Backend:
    def __init__(self) -> None:
        self.aborted = threading.Event()

    def abort(self) -> None:
        self.aborted.set()


def communicator(name: str, members: tuple[str, ...] = MEMBERS) -> Communicator:
    return Communicator(name, members, Backend())


def take(pools: list[Communicators]) -> list[Any]:
    """What every rank finds at once."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    found: list[Any] = [None] * len(pools)

    def run(rank: int) -> None:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=5))
        found[rank] = pools[rank]._common(own, MEMBERS, rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(pools))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    return found


def test_all_ranks_take_the_same_one_and_each_once() -> None:
    pools = [Communicators(), Communicators()]
    for order, pool in zip((("1", "2"), ("2", "1")), pools, strict=True):
        for name in order:
            pool.give_back(communicator(name))
    first, second, third = take(pools), take(pools), take(pools)
    assert [one.name for one in first] == ["1", "1"]
    assert [one.name for one in second] == ["2", "2"]
    assert third == [None, None]


def test_what_only_one_rank_has_is_taken_down() -> None:
    pools, torn, other = [Communicators(), Communicators()], communicator("1"), communicator("2", ("b/0", "a/0"))
    pools[0].give_back(torn)
    pools[0].give_back(other)
    assert take(pools) == [None, None]
    assert torn.backend.aborted.wait(5.0)
    assert not other.backend.aborted.is_set()


def test_a_peer_that_does_not_come_costs_nothing() -> None:
    pool = Communicators()
    pool.give_back(communicator("1"))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=0.2))
    with pytest.raises(RuntimeError):
        pool.take(store, "2", MEMBERS, 0, device=torch.device("cpu"), timeout_s=1.0)
    both = [pool, Communicators()]
    both[1].give_back(communicator("1"))
    assert [one.name for one in take(both)] == ["1", "1"]


def test_few_wait_and_none_when_all_is_cleared() -> None:
    pool, made = Communicators(), [communicator(str(number)) for number in range(8)]
    for one in made:
        pool.give_back(one)
    assert [one.backend.aborted.wait(1.0) for one in made[:2]] == [True, True]
    assert not any(one.backend.aborted.is_set() for one in made[2:])
    pool.clear()
    assert all(one.backend.aborted.wait(5.0) for one in made)
