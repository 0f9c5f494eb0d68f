"""How ranks that read each other's memory exchange: who has something shows it, who needs it copies it, and says so.

No message is packed, and nobody waits for a slot: a copy goes from where the data is to where it belongs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import msgspec
import torch

from serving.worker.groups import Group
from serving.worker.streams import beside_steps, mark

_READ = b"read"
_QUEUED = 3  # copies that the device has not done yet; more of them would be in the way of whoever decodes

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Way:
    """How copies get a device to themselves: during `clear` no step is launched, unless it says that it could not keep
    them away. After `most_s`, when the copies that were begun are done, a step is let through.
    """

    clear: Callable[[], AbstractContextManager[bool]]
    most_s: float


def swap(group: Group, shown: Mapping[int, Sequence[T]], sources: Iterable[int], kind: type[T]) -> dict[int, list[T]]:
    """Tell every peer in `shown` what is there for it; returns what `sources` say. Raises `GroupBroken`."""
    pending = [group.send_bytes(msgspec.msgpack.encode(list(some)), peer) for peer, some in shown.items()]
    found = {peer: msgspec.msgpack.decode(group.receive_bytes(peer), type=list[kind]) for peer in sources}  # type: ignore[valid-type]
    for one in pending:
        one.wait()
    return found


def finish(group: Group, sources: Iterable[int], readers: Iterable[int]) -> None:
    """All copies are done; tell their `sources`, and wait until `readers` have theirs. Raises `GroupBroken`."""
    group.check()
    pending = [group.send_bytes(_READ, peer) for peer in sources]
    for peer in readers:
        group.receive_bytes(peer)
    for one in pending:
        one.wait()


def bring(group: Group, copies: Iterable[Callable[[], None]], way: Way | None) -> float:
    """Copy: a copy and a step that share a device take twice as long, or three times, so steps make `way` where they
    can. Returns when it was begun. Raises `GroupBroken` as `pace` does.
    """
    left, began_s = deque(copies), 0.0
    while left and way is not None:
        with way.clear() as clear:
            resumed_s = time.monotonic()
            began_s = began_s or resumed_s
            if not clear:  # a long step, or one that hangs: the next would keep us waiting as well
                break
            pace(group, _until(left, resumed_s + way.most_s))
    began_s = began_s or time.monotonic()
    pace(group, left)
    return began_s


def _until(left: deque[Callable[[], None]], over_s: float) -> Iterator[Callable[[], None]]:
    """Take what is left, one at least, and no more after `over_s`."""
    yield left.popleft()
    while left and time.monotonic() < over_s:
        yield left.popleft()


def pace(group: Group, copies: Iterable[Callable[[], None]]) -> None:
    """Copy, asking for a few ahead of the device. Without copies the device, which may be waiting for a lost peer, is
    not waited for.

    Raises `GroupBroken` if the group was aborted: what is abandoned is not copied any further.
    """
    queued: deque[torch.cuda.Event] = deque()
    some = iter(copies)
    if (first := next(some, None)) is None:
        return
    with beside_steps(group.device):
        for copy in chain([first], some):
            group.check()
            copy()
            if (done := mark(group.device)) is not None:
                queued.append(done)
            if len(queued) > _QUEUED:
                queued.popleft().synchronize()
        if queued:
            queued[-1].synchronize()
