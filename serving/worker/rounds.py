"""Exchanges chunks with peers in numbered rounds: one message per peer and round, packed while another travels.

Both sides derive the same chunks from the same orders, so nothing but data crosses the group. A pair's
chunks match in order, and rounds are numbered alike everywhere: nobody waits in a circle.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import zip_longest
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from serving.worker.groups import Exchange, Group

_UNDER_WAY = 2  # rounds whose buffers are alive: one that travels, one that is packed or unpacked

C = TypeVar("C")
C_contra = TypeVar("C_contra", contravariant=True)


class Cargo(Protocol[C_contra]):
    """How chunks become messages and back."""

    def load(self, chunk: C_contra) -> Tensor:
        """The data of a chunk, contiguous on the group's device."""

    def buffer(self, chunk: C_contra) -> Tensor:
        """Room for what a peer's `load` returns."""

    def store(self, chunk: C_contra, data: Tensor) -> None:
        """Put what came where it belongs."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes sent and received, and the seconds that it took, packing included."""

    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0

    def then(self, later: Traffic) -> Traffic:
        """Both, one after the other."""
        sums = (mine + other for mine, other in zip(astuple(self), astuple(later), strict=True))
        return Traffic(*sums)


@dataclass(slots=True)
class _Round(Generic[C]):
    exchange: Exchange
    sent_bytes: int
    incoming: list[tuple[C, Tensor]]


class Rounds(Generic[C]):
    """Exchanges over `group`. Where messages go through host memory only `share` of the time is spent on them:
    others decode on the processors that they need. Copies between GPUs take neither processors nor kernels.
    """

    def __init__(self, group: Group, cargo: Cargo[C], share: float = 1.0) -> None:
        self._group, self._cargo = group, cargo
        self._share = 1.0 if group.direct else share

    def run(self, sends: Mapping[int, Iterable[C]], receives: Mapping[int, Iterable[C]]) -> Traffic:
        """Exchange everything, by rank of the peer. Raises `GroupBroken` if a peer is lost."""
        began = resumed = time.monotonic()
        sent = received = 0
        under_way: deque[_Round[C]] = deque()
        for outgoing, incoming in zip_longest(_rounds(sends), _rounds(receives)):
            under_way.append(self._start(outgoing or [], incoming or []))
            sent += under_way[-1].sent_bytes
            received += sum(data.nbytes for _, data in under_way[-1].incoming)
            if len(under_way) == _UNDER_WAY:
                self._finish(under_way.popleft())
                resumed = self._make_way(resumed)
        while under_way:
            self._finish(under_way.popleft())
            resumed = self._make_way(resumed)
        self._settle()
        return Traffic(sent, received, time.monotonic() - began)

    def _start(self, sent: list[tuple[int, C]], taken: list[tuple[int, C]]) -> _Round[C]:
        outgoing = [(self._cargo.load(chunk), peer) for peer, chunk in sent]
        incoming = [(self._cargo.buffer(chunk), peer) for peer, chunk in taken]
        exchange = self._group.begin_exchange(outgoing, incoming)
        chunks = [(chunk, buffer) for (_, chunk), (buffer, _) in zip(taken, incoming, strict=True)]
        return _Round(exchange, sum(data.nbytes for data, _ in outgoing), chunks)

    def _finish(self, one: _Round[C]) -> None:
        one.exchange.wait()
        for chunk, data in one.incoming:
            self._cargo.store(chunk, data)

    def _make_way(self, since: float) -> float:
        if self._share < 1.0:
            time.sleep((time.monotonic() - since) * (1.0 / self._share - 1.0))
        return time.monotonic()

    def _settle(self) -> None:
        self._group.flush()
        if self._group.device.type == "cuda":
            torch.cuda.current_stream(self._group.device).synchronize()
        self._group.check()


def _rounds(queues: Mapping[int, Iterable[C]]) -> Iterator[list[tuple[int, C]]]:
    for found in zip_longest(*queues.values()):
        yield [(peer, chunk) for peer, chunk in zip(queues, found, strict=True) if chunk is not None]
