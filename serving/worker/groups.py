"""Process groups of one epoch, built directly over a store prefix: no global world, nothing to shrink.

Bytes and control go over gloo; tensors over gloo on CPU and NCCL on CUDA. On CPU all collectives are
composed of point-to-point messages, which are an order of magnitude quicker than gloo's rings for the
few ranks of a stage. A broken group raises `GroupBroken`; dropping a group closes its sockets, which
makes every peer that waits on it fail in turn.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.nn import functional

from serving.errors import PerennialError
from serving.worker.checksum import as_bytes, checksum
from serving.worker.communicators import Communicator, Communicators
from serving.worker.peer_memory import PeerMemory, Sight
from serving.worker.window import Lane, Windows

logger = logging.getLogger(__name__)

_PACKET_BYTES = 8192
_LENGTH_BYTES = 8


class GroupBroken(PerennialError):
    """A peer is gone, or did not answer in time."""


def connect_store(address: str, timeout_s: float) -> dist.Store:
    """A client of the controller's rendezvous store at `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise GroupBroken(f"no rendezvous store at {address}") from error


@dataclass(slots=True)
class Waiting:
    """The rank of its replica that a step loop waits for, and how often waiting has ended; for others to read."""

    peer: int | None = None
    ended: int = 0

    @contextmanager
    def on(self, peer: int) -> Iterator[None]:
        """The block waits for `peer`."""
        self.peer = peer
        try:
            yield
        finally:
            self.peer = None
            self.ended += 1


class Pending:
    """Sends that are under way; the tensors stay alive until they are awaited."""

    def __init__(self, works: Sequence[dist.Work], tensors: Sequence[Tensor], waiting: Waiting, peer: int) -> None:
        self._works, self._tensors, self._waiting, self._peer = works, tensors, waiting, peer

    def wait(self) -> None:
        """Until the peer has taken everything. Raises `GroupBroken`."""
        with self._waiting.on(self._peer):
            for work in self._works:
                _wait(work)


@dataclass(frozen=True, slots=True)
class Hop:
    """The way to one peer of a group."""

    group: Group
    peer: int

    def send(self, tensor: Tensor) -> Pending:
        """See `Group.send`."""
        return self.group.send(tensor, self.peer)

    def receive(self, tensor: Tensor) -> Tensor:
        """See `Group.receive`."""
        return self.group.receive(tensor, self.peer)


class Exchange:
    """Messages under way in both directions."""

    def __init__(self, group: Group, pending: Sequence[Pending], receives: Sequence[tuple[Tensor, int]]) -> None:
        self._group, self._pending, self._receives = group, pending, receives

    def wait(self) -> None:
        """Until all is there, or on CUDA will be on the current stream. Raises `GroupBroken`."""
        for tensor, peer in self._receives:
            self._group.end_exchange(tensor, peer)
        for part in self._pending:
            part.wait()


def _wait(work: dist.Work) -> None:
    with _broken_groups():
        work.wait()


def _in_place(options: Any) -> Any:
    """A collective of NCCL on the caller's stream. On a stream of its own, recorded, it would keep whatever another
    thread asks of the device back until the recording is over: frames of KV too, for which the next step waits.
    """
    options.asyncOp = False
    return options


@contextmanager
def _broken_groups() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GroupBroken(str(error).splitlines()[0][:200]) from error


class Group:
    """Ranks 0 … size−1 that exchange bytes and tensors. Blocking calls give up after `timeout_s`.

    Construction is collective: it returns once all ranks have met in `store` under `prefix`. NCCL takes one
    rank per GPU; where ranks share one, the tensors of the group go through host memory instead. A group
    that works beside others' steps has `windows` instead of NCCL, and one `of_bytes` needs neither.
    `waiting` is kept up to date, in `ranks`: what the members are called there. `members` name the devices, for
    which `communicators` may have one that an earlier group is done with.
    """

    def __init__(
        self,
        store: dist.Store,
        prefix: str,
        rank: int,
        size: int,
        *,
        device: torch.device,
        host: str,
        timeout_s: float,
        waiting: Waiting | None = None,
        ranks: Sequence[int] | None = None,
        windows: Windows | None = None,
        of_bytes: bool = False,
        members: Sequence[str] = (),
        communicators: Communicators | None = None,
    ) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.waiting, self._ranks = waiting or Waiting(), tuple(ranks or range(size))
        self._nccl: Any = None  # torch's CPU builds have no type for it
        self._communicator: Communicator | None = None
        self._communicators = communicators or Communicators()
        self._lanes: dict[int, Lane] = {}
        self._memory: PeerMemory | None = None
        self.direct = False
        """Whether every rank reads every other's GPU memory."""
        self._aborted = False
        if size == 1:
            return
        try:
            self._gloo = _gloo(dist.PrefixStore(f"{prefix}/gloo", store), rank, size, host, timeout_s)
            if windows is not None:
                self._lanes = windows.meet(dist.PrefixStore(f"{prefix}/windows", store), self._gloo, rank, size)
                self._memory = windows.memory() if self._lanes else None
                complete = len(self._lanes) == size - 1
                self.direct = _agreed(dist.PrefixStore(f"{prefix}/direct", store), rank, size, complete)
            elif (
                not of_bytes
                and device.type == "cuda"
                and _on_distinct_gpus(dist.PrefixStore(f"{prefix}/gpu", store), rank, size, device)
            ):
                names = members or [str(one) for one in range(size)]
                self._communicator = self._communicators.take(
                    dist.PrefixStore(f"{prefix}/nccl", store), prefix, names, rank, device=device, timeout_s=timeout_s
                )
                self._nccl = self._communicator.backend
        except RuntimeError as error:
            raise GroupBroken(f"group {prefix} did not form: {str(error).splitlines()[0][:200]}") from error

    def send(self, tensor: Tensor, peer: int) -> Pending:
        """Start sending a contiguous tensor."""
        if self._nccl is not None:
            work = self._broadcast(tensor, self.rank)
            return Pending([work], [tensor], self.waiting, self._ranks[peer])
        return self._start(tensor.cpu(), peer)

    def _broadcast(self, tensor: Tensor, root: int) -> dist.Work:
        """From one of two ranks to the other: NCCL connects them for collectives when it is made, for messages only
        at the first one, which takes a third of a second.
        """
        assert self.size == 2, "messages of NCCL groups are broadcasts, and a broadcast reaches everybody"
        options: Any = dist.BroadcastOptions()
        options.rootRank = root
        with _broken_groups():
            work: dist.Work = self._nccl.broadcast([tensor], options)
        return work

    def receive(self, tensor: Tensor, peer: int) -> Tensor:
        """Fill a contiguous tensor from `peer`; on CUDA the stream waits, not the caller."""
        if self._nccl is None and tensor.device.type != "cpu":
            return tensor.copy_(self.receive(torch.empty_like(tensor, device="cpu"), peer))
        with _broken_groups():
            work = self._broadcast(tensor, peer) if self._nccl is not None else self._gloo.recv([tensor], peer, 0)
        with self.waiting.on(self._ranks[peer]):
            _wait(work)
        self.check()
        return tensor

    def send_bytes(self, payload: bytes, peer: int) -> Pending:
        """Start sending bytes: one packet of fixed size, and a second message if they do not fit."""
        packet = torch.zeros(_PACKET_BYTES, dtype=torch.uint8)
        raw = torch.frombuffer(bytearray(len(payload).to_bytes(_LENGTH_BYTES, "little") + payload), dtype=torch.uint8)
        head = min(raw.numel(), _PACKET_BYTES)
        packet[:head] = raw[:head]
        pending = [self._start(packet, peer)]
        if raw.numel() > _PACKET_BYTES:
            pending.append(self._start(raw[_PACKET_BYTES:], peer))
        works = [work for part in pending for work in part._works]
        return Pending(works, [packet, raw], self.waiting, self._ranks[peer])

    def receive_bytes(self, peer: int) -> bytes:
        """The next bytes from `peer`."""
        packet = torch.empty(_PACKET_BYTES, dtype=torch.uint8)
        self._fill(packet, peer)
        data = packet.numpy().tobytes()
        size = int.from_bytes(data[:_LENGTH_BYTES], "little")
        body = data[_LENGTH_BYTES : _LENGTH_BYTES + size]
        if len(body) < size:
            rest = torch.empty(size - len(body), dtype=torch.uint8)
            self._fill(rest, peer)
            body += rest.numpy().tobytes()
        return body

    def _fill(self, tensor: Tensor, peer: int) -> None:
        with _broken_groups():
            work = self._gloo.recv([tensor], peer, 0)
        with self.waiting.on(self._ranks[peer]):
            _wait(work)
        self.check()

    def _start(self, tensor: Tensor, peer: int) -> Pending:
        with _broken_groups():
            return Pending([self._gloo.send([tensor], peer, 0)], [tensor], self.waiting, self._ranks[peer])

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Element-wise sum over the ranks, in rank order on CPU; the same on every rank."""
        if self.size == 1:
            return tensor
        if self._nccl is not None:
            with _broken_groups():
                self._nccl.allreduce([tensor], _in_place(c10d.AllreduceOptions()))
            self.check()
            return tensor
        tensor = tensor.contiguous()
        pending = [self.send(tensor, peer) for peer in range(self.size) if peer != self.rank]
        parts = [
            tensor if peer == self.rank else self.receive(torch.empty_like(tensor), peer) for peer in range(self.size)
        ]
        for one in pending:
            one.wait()
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """Concatenate `[n, sizes[rank]]` along the last dimension on rank 0; None elsewhere."""
        if self.size == 1:
            return tensor
        tensor = tensor.contiguous()
        if self._nccl is not None:
            return self._gather_directly(tensor, sizes)
        if self.rank:
            self.send(tensor, 0).wait()
            return None
        rows = tensor.shape[0]
        others = [self.receive(tensor.new_empty(rows, sizes[peer]), peer) for peer in range(1, self.size)]
        return torch.cat([tensor, *others], dim=-1)

    def _gather_directly(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """By a collective: for messages NCCL would connect pairs at their first, which must not be in a recording."""
        padded = functional.pad(tensor, (0, max(sizes) - tensor.shape[1]))
        parts = tensor.new_empty(self.size, *padded.shape)
        with _broken_groups():
            self._nccl._allgather_base(parts, padded, _in_place(c10d.AllgatherOptions()))
        self.check()
        return None if self.rank else torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], -1)

    def message_bytes(self, otherwise: int) -> int:
        """The largest message, the same on every rank: no more than a slot of the lanes where these join all."""
        return min([otherwise, *(lane.slot_bytes for lane in self._lanes.values())]) if self.direct else otherwise

    def begin_exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Exchange:
        """Swap contiguous tensors with peers; those between one pair match in order. More may begin before the
        first has ended, up to two. What goes through host memory, perhaps to another host, brings its checksum.
        """
        pending = []
        for tensor, peer in sends:
            if (lane := self._lane(peer, tensor)) is not None:
                with _broken_groups():
                    lane.post(tensor)
            else:
                host = tensor.cpu()
                pending += [self._start(host, peer), self._start(_checksum(host), peer)]
        return Exchange(self, pending, receives)

    def end_exchange(self, tensor: Tensor, peer: int) -> None:
        """Receive one tensor of an exchange. Raises `GroupBroken` if it arrived damaged."""
        lane = self._lane(peer, tensor)
        if lane is None:
            self._receive_checked(tensor, peer)
            return
        with self.waiting.on(self._ranks[peer]), _broken_groups():
            lane.fetch(tensor)
        self.check()

    def _receive_checked(self, tensor: Tensor, peer: int) -> None:
        host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
        expected = torch.empty(1, dtype=torch.int64)
        self._fill(host, peer)
        self._fill(expected, peer)
        if not torch.equal(_checksum(host), expected):
            raise GroupBroken(f"a message of rank {peer} arrived damaged")
        if host is not tensor:
            tensor.copy_(host)

    def _lane(self, peer: int, tensor: Tensor) -> Lane | None:
        """The lane that a message takes, the same for both ends: it may exceed a slot where other peers have none."""
        lane = self._lanes.get(peer)
        return lane if lane is not None and tensor.nbytes <= lane.slot_bytes else None

    def flush(self) -> None:
        """All exchanges have ended, for the peers too."""
        for lane in self._lanes.values():
            with _broken_groups():
                lane.flush()

    def check(self) -> None:
        """Raise `GroupBroken` if the group was aborted: what a cut collective left behind is not data."""
        if self._aborted:
            raise GroupBroken("the group was aborted")

    def reads(self, peer: int) -> bool:
        """Whether this rank and `peer` read each other's GPU memory."""
        return peer in self._lanes

    def show(self, tensor: Tensor) -> Sight:
        """A tensor of this rank's GPU, for ranks that read its memory."""
        assert self._memory is not None, "only who has lanes is read"
        with _broken_groups():
            return self._memory.show(tensor)

    def see(self, sight: Sight, dtype: torch.dtype) -> Tensor:
        """What such a rank shows; for as long as the group lives, and its owner leaves it there."""
        assert self._memory is not None, "only who has lanes reads"
        with _broken_groups():
            return self._memory.see(sight, dtype)

    def give_up(self) -> None:
        """From any thread: what operations that run bring is not data any more. They may run on."""
        self._aborted = True

    def abort(self) -> None:
        """From any thread: make running operations fail. gloo's fail when the peers drop the group."""
        self._aborted = True
        if self._communicator is not None:
            self._communicator.abort()

    def close(self) -> None:
        """Nothing runs here any more, on no rank: what is costly to make again waits for another group."""
        if self._communicator is not None and not self._aborted:
            self._communicators.give_back(self._communicator)
        self._communicator = None


def _checksum(tensor: Tensor) -> Tensor:
    return torch.tensor([checksum(as_bytes(tensor))])


def _agreed(store: dist.Store, rank: int, size: int, own: bool) -> bool:
    """Whether all ranks say yes."""
    store.set(str(rank), "yes" if own else "no")
    return all(bytes(store.get(str(peer))) == b"yes" for peer in range(size))


def _on_distinct_gpus(store: dist.Store, rank: int, size: int, device: torch.device) -> bool:
    store.set(str(rank), str(torch.cuda.get_device_properties(device).uuid))
    return len({bytes(store.get(str(peer))) for peer in range(size)}) == size


def _gloo(store: dist.Store, rank: int, size: int, host: str, timeout_s: float) -> Any:
    backend: Any = dist.ProcessGroupGloo
    options = backend._Options()
    options._timeout = timedelta(seconds=timeout_s)
    # Naming the address keeps gloo off every other interface.
    options._devices = [backend.create_device(hostname=host)]
    return backend(store, rank, size, options)
