"""Ranks of a group in one process that read each other's memory, as processes on GPUs of one host do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from itertools import permutations
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from serving.worker.groups import Group
from serving.worker.peer_memory import PeerMemory, Sight
from serving.worker.window import Lane, Windows

SLOT_BYTES = 64


class SharedMemory:
    """In place of `PeerMemory`: what is shown is found by its name."""

    shown: ClassVar[dict[bytes, Tensor]] = {}

    def show(self, tensor: Tensor) -> Sight:
        name = str(len(self.shown)).encode()
        self.shown[name] = tensor
        return Sight(name, 0, tuple(tensor.shape), tuple(tensor.stride()))

    def see(self, sight: Sight, dtype: torch.dtype) -> Tensor:
        tensor = self.shown[sight.handle]
        assert tensor.dtype == dtype
        return tensor


class Shared:
    """In place of `Windows`: all ranks are in this process, and so is the memory that they read of each other."""

    def __init__(self, windows: dict[tuple[int, int], list[Tensor]]) -> None:
        self._windows = windows  # by owner and reader

    def memory(self) -> PeerMemory:
        return cast(PeerMemory, SharedMemory())

    def meet(self, store: dist.Store, gloo: Any, rank: int, size: int) -> dict[int, Lane]:
        return {
            reader: Lane(gloo, reader, list(enumerate(own)), self._windows[reader, rank], self.memory())
            for (owner, reader), own in self._windows.items()
            if owner == rank
        }


def meet(size: int, *, apart: tuple[int, ...] = (), timeout_s: float = 10.0) -> list[Group]:
    """All ranks of a group; any two that are not both `apart` exchange by windows of three slots."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    windows = {
        pair: [torch.zeros(SLOT_BYTES, dtype=torch.uint8) for _ in range(3)]
        for pair in permutations(range(size), 2)
        if not set(pair) <= set(apart)
    }
    found: list[Any] = [None] * size

    def join(rank: int) -> None:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=10))
        shared, cpu = cast(Windows, Shared(windows)), torch.device("cpu")
        found[rank] = Group(own, "g", rank, size, device=cpu, host="127.0.0.1", timeout_s=timeout_s, windows=shared)

    everyone(size, join)
    return found


def everyone(size: int, work: Callable[[int], None]) -> None:
    """Every rank works in a thread of its own; what one of them raised is raised."""
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert not any(thread.is_alive() for thread in threads), "an end of a lane waits for ever"
    if failures:
        raise failures[0]
