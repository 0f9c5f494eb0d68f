"""How much work is outstanding, and when a request would be done: a model of slots, not of steps.

A replica runs up to `max_batch` requests at once, each in a *slot*. A decode step takes about as long for one
request as for a full batch, so a request has the slot for as long as it would run alone, and takes of the devices
its share of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace


@dataclass(frozen=True, slots=True)
class Work:
    """What is left to do of a request: tokens to prefill and, at most, tokens to decode."""

    prefill_tokens: int
    decode_tokens: int


@dataclass(frozen=True, slots=True)
class Pace:
    """How quick a replica is: seconds for a token of prefill and for a decode step, for `max_batch` at once."""

    prefill_token_s: float
    step_s: float
    max_batch: int

    def device_s(self, work: Work) -> float:
        """Seconds of the devices that a request takes when the batch is full."""
        return work.prefill_tokens * self.prefill_token_s + work.decode_tokens * self.step_s / self.max_batch

    def alone_s(self, work: Work) -> float:
        """Seconds from its start to its end."""
        return work.prefill_tokens * self.prefill_token_s + work.decode_tokens * self.step_s

    def beside(self, others: Iterable[Pace]) -> Pace:
        """As it is while models that share the devices take turns with it: one step each."""
        return replace(self, step_s=self.step_s + sum(other.step_s for other in others))


IN_TOKENS = Pace(1.0, 1.0, 1)
"""For replicas of unknown pace: work is counted in tokens."""


@dataclass(frozen=True, slots=True)
class Server:
    """A replica as admission sees it: its pace, and what is left of the requests that it has."""

    pace: Pace
    works: tuple[Work, ...]


def done_in_s(servers: Sequence[Server], queued: Sequence[Work], own: Work) -> float:
    """In how many seconds a request is done at the earliest, behind those on the servers and those `queued`.

    List scheduling: requests take, in order, the slot that is free first. Infinite without servers.
    """
    if not servers:
        return float("inf")
    slots = [(free_s, index) for index, server in enumerate(servers) for free_s in _slots(server)]
    heapify(slots)
    for work in queued:
        free_s, index = slots[0]
        heapreplace(slots, (free_s + servers[index].pace.alone_s(work), index))
    return min(free_s + servers[index].pace.alone_s(own) for free_s, index in slots)


def _slots(server: Server) -> list[float]:
    """When every slot of a server is free."""
    slots = [0.0] * server.pace.max_batch
    for work in server.works:
        heapreplace(slots, slots[0] + server.pace.alone_s(work))
    return slots
