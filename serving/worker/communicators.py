"""NCCL communicators, and those of this process that wait to be used again.

While one is made others wait for the driver; while one is taken down, which takes longer, whoever allocates memory
stands still with the interpreter in hand. Layouts come back: so do their communicators.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)

_MOST_IDLE = 6


@dataclass(frozen=True, slots=True)
class Communicator:
    """A communicator of some devices in some order. `name` is the same on all of its ranks, and nobody else's."""

    name: str
    members: tuple[str, ...]
    backend: Any  # torch's CPU builds have no type for it

    def abort(self) -> None:
        """From any thread: make running operations fail. Returns at once: the end itself may wait, for ever if a
        peer is gone at the wrong moment.
        """
        threading.Thread(target=self._abort, name="abort", daemon=True).start()

    def _abort(self) -> None:
        began = time.monotonic()
        self.backend.abort()
        logger.info("NCCL's abort returned after %.2f s", time.monotonic() - began)


class Communicators:
    """Those of one process. What is taken belongs to the taker until it is given back, at rest and in one piece."""

    def __init__(self) -> None:
        self._idle: list[Communicator] = []
        self._lock = threading.Lock()

    def take(
        self,
        store: dist.Store,
        name: str,
        members: Sequence[str],
        rank: int,
        *,
        device: torch.device,
        timeout_s: float,
    ) -> Communicator:
        """One of these devices, in this order; collective. A new one is called `name`. Raises `RuntimeError`."""
        found = self._common(store, tuple(members), rank)
        if found is not None:
            return found
        backend = _nccl(dist.PrefixStore("nccl", store), rank, len(members), device, timeout_s)
        return Communicator(name, tuple(members), backend)

    def _common(self, store: dist.Store, members: tuple[str, ...], rank: int) -> Communicator | None:
        """An idle one that is idle on every rank; those that only some ranks have are of no use any more."""
        with self._lock:
            own = {one.name: one for one in self._idle if one.members == members}
            self._idle = [one for one in self._idle if one.members != members]
        try:
            store.set(f"idle/{rank}", msgspec.json.encode(sorted(own)).decode())
            idle = (bytes(store.get(f"idle/{peer}")) for peer in range(len(members)))
            common = sorted(set.intersection(*(msgspec.json.decode(one, type=set[str]) for one in idle)))
        except RuntimeError:  # a peer did not come: nothing was taken
            for one in own.values():
                self.give_back(one)
            raise
        for name, one in own.items():
            if name not in common:
                one.abort()
            elif name != common[0]:
                self.give_back(one)
        return own[common[0]] if common else None

    def give_back(self, communicator: Communicator) -> None:
        """Nothing runs on it any more, on no rank, and nothing failed."""
        with self._lock:
            self._idle.append(communicator)
            surplus = self._idle[:-_MOST_IDLE]
            self._idle = self._idle[-_MOST_IDLE:]
        for one in surplus:
            one.abort()

    def clear(self) -> None:
        """Take all idle ones down."""
        with self._lock:
            idle, self._idle = self._idle, []
        for one in idle:
            one.abort()


def _nccl(store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float) -> Any:
    backend: Any = dist.ProcessGroupNCCL
    options = backend.Options()
    options._timeout = timedelta(seconds=timeout_s)
    group = backend(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group
