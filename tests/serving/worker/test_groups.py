from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from serving.controller.rendezvous import Rendezvous
from serving.worker.checksum import as_bytes, checksum
from serving.worker.groups import Group, GroupBroken, Hop, connect_store
from tests.serving.worker.conftest import Members

QUICK_S = 2.0  # far below the groups' timeout


def test_bytes_of_all_sizes_arrive_in_order(members: Members) -> None:
    outcomes = members.all_do("swap_bytes", sizes=[0, 1, 8183, 8184, 8185, 8192, 100_000, 0, 3_000_000, 5])
    assert [outcome.result for outcome in outcomes] == [True] * 3


@pytest.mark.parametrize("kind", ["int64", "float32"])
@pytest.mark.parametrize("shape", [[1], [7, 33], [256, 1024]])
def test_all_reduce_is_the_sum_in_rank_order_to_the_last_bit(members: Members, kind: str, shape: list[int]) -> None:
    outcomes = members.all_do("all_reduce", kind=kind, shape=shape)
    assert [outcome.result for outcome in outcomes] == [True] * 3


def test_gather(members: Members) -> None:
    assert [outcome.result for outcome in members.all_do("gather", sizes=[5, 1, 40])] == [True] * 3


def test_everybody_swaps_with_everybody(members: Members) -> None:
    outcomes = members.all_do("exchange", sizes=[1, 1000, 1_000_000, 17])
    assert [outcome.result for outcome in outcomes] == [True] * 3


def test_who_waits_for_a_killed_peer_learns_it_at_once(members: Members) -> None:
    store = Rendezvous("127.0.0.1", 10.0)
    members.begin(store, {0: ("wait_for", {"peer": 2}), 1: ("wait_for", {"peer": 2}), 2: ("wait_for", {"peer": 0})})
    time.sleep(0.5)
    members.processes[2].send_signal(signal.SIGKILL)
    outcomes = [members.outcome(rank) for rank in (0, 1)]
    members.replace(2)
    store.close()
    for outcome in outcomes:
        assert outcome.broken
        assert outcome.seconds < QUICK_S + 0.5


def test_a_peer_that_drops_the_group_frees_the_others(members: Members) -> None:
    store = Rendezvous("127.0.0.1", 10.0)
    members.begin(store, {0: ("wait_for", {"peer": 2}), 1: ("wait_for", {"peer": 2}), 2: ("leave", {"after_s": 0.2})})
    outcomes = [members.outcome(rank) for rank in range(3)]
    store.close()
    assert outcomes[2].result
    for outcome in outcomes[:2]:
        assert outcome.broken
        assert outcome.seconds < QUICK_S


def test_a_stopped_peer_costs_the_timeout_and_no_more(members: Members) -> None:
    store = Rendezvous("127.0.0.1", 10.0)
    tasks = {0: ("wait_for", {"peer": 2}), 1: ("leave", {"after_s": 0.1}), 2: ("leave", {"after_s": 60.0})}
    members.begin(store, tasks, timeout_s=1.5)
    assert members.outcome(1).result
    members.processes[2].send_signal(signal.SIGSTOP)
    outcome = members.outcome(0)
    members.replace(2)
    store.close()
    assert outcome.broken
    assert 1.0 < outcome.seconds < 1.5 + QUICK_S


def test_an_aborted_group_says_so(members: Members) -> None:
    assert {outcome.broken for outcome in members.all_do("aborted")} == {"the group was aborted"}


def test_a_group_that_lacks_a_member_does_not_form(members: Members) -> None:
    store = Rendezvous("127.0.0.1", 10.0)
    members.begin(store, {0: ("aborted", {}), 1: ("aborted", {})}, timeout_s=1.0)
    outcomes = [members.outcome(rank) for rank in (0, 1)]
    store.close()
    for outcome in outcomes:
        assert "did not form" in outcome.broken
        assert 0.5 < outcome.seconds < 1.0 + QUICK_S


def test_closing_the_store_frees_those_who_meet_in_it(members: Members) -> None:
    store = Rendezvous("127.0.0.1", 30.0)
    members.begin(store, {0: ("aborted", {}), 1: ("aborted", {})}, timeout_s=20.0)
    time.sleep(0.5)
    store.close()
    for rank in (0, 1):
        outcome = members.outcome(rank)
        assert outcome.broken
        assert outcome.seconds < 0.5 + QUICK_S


def test_no_store_there() -> None:
    store = Rendezvous("127.0.0.1", 1.0)
    store.close()
    with pytest.raises(GroupBroken, match="no rendezvous store"):
        connect_store(store.address, 0.5)


def test_messages_of_a_pair_can_be_broadcasts() -> None:
    """What NCCL does, by a backend that is here and has the same calls."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))

    def talk(rank: int) -> list[float]:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=10))
        group = Group(own, "p", rank, 2, device=torch.device("cpu"), host="127.0.0.1", timeout_s=10.0, ranks=(3, 5))
        group._nccl = group._gloo
        hop, heard = Hop(group, 1 - rank), []
        for step in range(4):
            if step % 2 == rank:
                hop.send(torch.full((2, 3), float(step))).wait()
            else:
                heard.append(float(hop.receive(torch.empty(2, 3)).sum()))
        return heard

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(talk, range(2))) == [[6.0, 18.0], [0.0, 12.0]]


def test_a_message_that_arrives_damaged_breaks_the_group() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))

    def talk(rank: int) -> bool:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=10))
        group = Group(own, "d", rank, 2, device=torch.device("cpu"), host="127.0.0.1", timeout_s=10.0)
        data = torch.arange(5000, dtype=torch.float32)
        if rank == 0:
            group.begin_exchange([(data, 1)], []).wait()
            for part in (data + (data == 77), torch.tensor([checksum(as_bytes(data))])):
                group.send(part, 1).wait()
            return True
        room = torch.empty_like(data)
        group.begin_exchange([], [(room, 0)]).wait()
        with pytest.raises(GroupBroken, match="damaged"):
            group.begin_exchange([], [(room, 0)]).wait()
        return True

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(talk, range(2))) == [True, True]
