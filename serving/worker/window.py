"""Memory of one GPU that processes of other GPUs of its host read: how tensors move beside running replicas.

Copies between GPUs need no kernel that waits for a peer. Two NCCL groups side by side do: a kernel of one
can keep that of the other from starting on one GPU, and the other way round on the next, for ever.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from serving.worker.peer_memory import PeerMemory, Sight
from serving.worker.streams import mark

logger = logging.getLogger(__name__)

_SLOTS = 3  # of a lane: one is filled, one is read, and of one it is said that it was read
_ALIGNMENT = 4096
_CLOSED_S = 10.0  # after a peer was met for the last time: by then a broken replica has been taken down
_READY, _READ = 1, 2  # tags of what a lane says, apart from the group's other messages
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class _Card(msgspec.Struct, frozen=True):
    """Who somebody is: its window, and the host it is on."""

    window: str
    host: str
    window_bytes: int


class _Theirs(NamedTuple):
    """A peer's window, and what keeps it open."""

    data: Tensor
    memory: PeerMemory


class Windows:
    """The window of this process, made when a peer on this host is met, and those of its peers."""

    def __init__(self, device: torch.device, window_bytes: int) -> None:
        self._device, self._window_bytes = device, window_bytes
        self._name = uuid.uuid4().hex
        self._own: Tensor | None = None
        self._shown = b""
        self._theirs: dict[str, _Theirs] = {}

    def meet(self, store: dist.Store, gloo: Any, rank: int, size: int) -> dict[int, Lane]:
        """Lanes to the ranks of this host that can read each other's memory; collective."""
        cards = self._introduce(store, rank, size)
        here = [peer for peer, card in cards.items() if card.host == cards[rank].host and peer != rank]
        slot_bytes = self._window_bytes // (_SLOTS * max(1, len(here))) // _ALIGNMENT * _ALIGNMENT
        if not slot_bytes or len({cards[peer].window_bytes for peer in (*here, rank)}) > 1:
            return {}
        if here:
            store.set(f"window/{rank}", self._show().hex())
        shown = {peer: bytes.fromhex(store.get(f"window/{peer}").decode()) for peer in here}
        opened = {peer: self._open(cards[peer].window, shown[peer]) for peer in here}
        for peer, theirs in opened.items():
            store.set(f"opened/{rank}/{peer}", "0" if theirs is None else "1")
        self._keep({cards[peer].window: theirs for peer, theirs in opened.items() if theirs is not None})
        return {
            peer: Lane(gloo, peer, self._part(index, slot_bytes), list(theirs.data.split(slot_bytes)), theirs.memory)
            for index, (peer, theirs) in enumerate(opened.items())
            if theirs is not None and bytes(store.get(f"opened/{peer}/{rank}")) == b"1"
        }

    def memory(self) -> PeerMemory:
        """For one group: what its members show each other beside their windows."""
        return PeerMemory(self._device)

    def _introduce(self, store: dist.Store, rank: int, size: int) -> dict[int, _Card]:
        card = _Card(self._name, _BOOT.read_text(encoding="ascii").strip(), self._window_bytes)
        store.set(f"card/{rank}", msgspec.json.encode(card).decode())
        return {peer: msgspec.json.decode(bytes(store.get(f"card/{peer}")), type=_Card) for peer in range(size)}

    def _show(self) -> bytes:
        """What others open this window with. Nothing if there is no memory for one, or nobody may read it."""
        try:
            if self._own is None:
                self._own = torch.empty(self._window_bytes, dtype=torch.uint8, device=self._device)
            self._shown = self._shown or msgspec.msgpack.encode(self.memory().show(self._own))
        except RuntimeError as error:
            logger.warning("no window for others on this host, tensors go through its memory: %s", error)
        return self._shown

    def _open(self, window: str, shown: bytes) -> _Theirs | None:
        if window in self._theirs or not shown:
            return self._theirs.get(window)
        try:
            memory = self.memory()
            return _Theirs(memory.see(msgspec.msgpack.decode(shown, type=Sight), torch.uint8), memory)
        except RuntimeError as error:  # a container may forbid it
            logger.warning("a peer's window cannot be read, tensors go through host memory: %s", error)
            return None

    def _keep(self, theirs: dict[str, _Theirs]) -> None:
        """Close all other windows, some time later, in a thread of its own: it waits for the device, and that may be
        waiting for whoever has just been lost.
        """
        closing = [one for window, one in self._theirs.items() if window not in theirs]
        self._theirs = theirs
        if closing:
            later = threading.Timer(_CLOSED_S, closing.clear)
            later.daemon = True
            later.start()

    def _part(self, lane: int, slot_bytes: int) -> list[tuple[int, Tensor]]:
        assert self._own is not None
        return list(enumerate(self._own.split(slot_bytes)))[lane * _SLOTS : (lane + 1) * _SLOTS]


class Lane:
    """Messages to and from one peer, each at most as large as a slot: the sender fills a slot of its window and
    says so, the receiver reads it and says so. What it says goes over `gloo`. `memory` is what keeps `theirs` open.
    """

    def __init__(
        self,
        gloo: Any,
        peer: int,
        own: list[tuple[int, Tensor]],
        theirs: list[Tensor],
        memory: PeerMemory,
    ) -> None:
        self._gloo, self._peer, self._own, self._theirs, self._memory = gloo, peer, dict(own), theirs, memory
        self._free = deque(self._own)
        self._unread = 0  # slots that are with the peer
        self._said: deque[tuple[dist.Work, Tensor]] = deque()
        self._reading: deque[tuple[int, torch.cuda.Event | None]] = deque()
        self.slot_bytes = len(theirs[0])

    def post(self, tensor: Tensor) -> None:
        """Send a contiguous tensor; it may be changed afterwards. Raises `RuntimeError` if the peer is lost."""
        if not self._free:
            self._take_back()
        slot = self._free.popleft()
        data = tensor.view(-1).view(torch.uint8)
        self._own[slot][: data.numel()].copy_(data)
        if (written := mark(tensor.device)) is not None:
            written.synchronize()
        self._say(slot, _READY)
        self._unread += 1

    def _take_back(self) -> None:
        self._free.append(self._hear(_READ))
        self._unread -= 1

    def fetch(self, tensor: Tensor) -> None:
        """Receive a contiguous tensor on the current stream; `flush` at last."""
        slot = self._hear(_READY)
        data = tensor.view(-1).view(torch.uint8)
        data.copy_(self._theirs[slot][: data.numel()], non_blocking=True)
        self._reading.append((slot, mark(tensor.device)))
        if len(self._reading) > 1:  # one is read while the next is awaited
            self._done()

    def flush(self) -> None:
        """Everything that was fetched is there, and everything that was posted is at the peer; for both to call."""
        while self._reading:
            self._done()
        while self._unread:
            self._take_back()
        while self._said:
            self._said.popleft()[0].wait()

    def _done(self) -> None:
        slot, read = self._reading.popleft()
        if read is not None:
            read.synchronize()
        self._say(slot, _READ)

    def _say(self, slot: int, tag: int) -> None:
        word = torch.tensor([slot])
        # Awaited at last: until then the peer may have reasons not to listen.
        self._said.append((self._gloo.send([word], self._peer, tag), word))

    def _hear(self, tag: int) -> int:
        word = torch.zeros(1, dtype=torch.int64)
        self._gloo.recv([word], self._peer, tag).wait()
        return int(word)
