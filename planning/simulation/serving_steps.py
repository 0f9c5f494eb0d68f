"""Continuous batching by decode steps on several replicas, compiled.

A replica works step by step: prompts that wait are prefilled in groups before the next decode step, every
running request gets one token per decode step, and whoever has all tokens leaves. Times are those of
`planning.step_costs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planning.simulation.compiled import compiled
from planning.static_batch import OUTPUT_TOKENS
from planning.step_costs import INPUT_TOKENS, MOST_GROUP, StepTimes

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WAITING, TAKEN, DONE = 0, 1, 2
_ROOM = 512


class _Replicas(NamedTuple):
    """Arrays over replicas; `ids` holds the running requests first, then those to be prefilled.

    With `whole`, a batch starts and ends together: no prompt joins requests that run.
    """

    up_s: Array
    free_s: Array
    accepts: Ints
    whole: Ints
    room: Ints
    running: Ints
    held: Ints
    ids: Ints
    decode_s: Array
    through_s: Array
    slowest_s: Array


class _Line(NamedTuple):
    """Arrays over requests in order of arrival; `cursor` is the first that may be waiting."""

    arrival_s: Array
    state: Ints
    tokens: Ints
    ready_s: Array
    done_s: Array
    cursor: Ints


@dataclass(slots=True)
class Service:
    """Requests and up to `most` replicas; numbers of removed replicas are used again."""

    arrival_s: Array
    most: int
    line: _Line = field(init=False)
    replicas: _Replicas = field(init=False)
    now_s: float = 0.0

    def __post_init__(self) -> None:
        count, most = len(self.arrival_s), self.most
        whole = (np.zeros(count, dtype=np.int64) for _ in range(2))
        cursor = np.zeros(1, dtype=np.int64)
        self.line = _Line(self.arrival_s, next(whole), next(whole), np.zeros(count), np.full(count, inf), cursor)
        ints = (np.zeros(most, dtype=np.int64) for _ in range(5))
        self.replicas = _Replicas(
            np.full(most, inf), np.zeros(most), next(ints), next(ints), next(ints), next(ints), next(ints),
            np.zeros((most, _ROOM), dtype=np.int64), np.zeros((most, _ROOM)),
            np.zeros((most, MOST_GROUP + 1)), np.zeros((most, MOST_GROUP + 1)),
        )  # fmt: skip

    @property
    def all_done(self) -> bool:
        """Whether nothing is left to do."""
        return bool((self.line.state == DONE).all())

    def start(self, replica: int, at_s: float, times: StepTimes, *, whole: bool = False) -> None:
        """An empty replica that serves from `at_s` on; `whole`: its batches start and end together."""
        it = self.replicas
        it.whole[replica] = whole
        it.up_s[replica] = it.free_s[replica] = at_s
        it.accepts[replica], it.room[replica] = 1, times.room
        it.running[replica] = it.held[replica] = 0
        it.decode_s[replica, : times.room + 1] = times.decode_s
        it.through_s[replica], it.slowest_s[replica] = times.through_s, times.slowest_s

    def stop(self, replica: int) -> tuple[list[int], list[int]]:
        """Take a replica away; its running requests, and those that wait in it, which nobody has now."""
        it = self.replicas
        ids = [int(request) for request in it.ids[replica, : it.held[replica]]]
        running = int(it.running[replica])
        it.up_s[replica] = inf
        it.running[replica] = it.held[replica] = it.accepts[replica] = 0
        return ids[:running], ids[running:]

    def give_up(self, replica: int) -> None:
        """A replica is gone with all KV: its requests are computed again, elsewhere."""
        running, waiting = self.stop(replica)
        self.give_back([*running, *waiting])

    def close(self, replica: int) -> None:
        """No new requests for a replica; those that wait in it go back to the line."""
        it = self.replicas
        it.accepts[replica] = 0
        self.give_back([int(one) for one in it.ids[replica, it.running[replica] : it.held[replica]]])
        it.held[replica] = it.running[replica]

    def give_back(self, requests: Sequence[int]) -> None:
        """Requests without KV return to the line, before all that arrived later; their tokens are known."""
        for request in requests:
            self.line.state[request] = WAITING
            self.line.cursor[0] = min(int(self.line.cursor[0]), request)

    def adopt(self, replica: int, requests: Sequence[int], at_s: float) -> list[int]:
        """Requests whose KV is there go on at `at_s`; those that find no room are returned."""
        it = self.replicas
        space = int(it.room[replica] - it.held[replica])
        for request in requests[:space]:
            last, first = int(it.held[replica]), int(it.running[replica])
            it.ids[replica, last] = it.ids[replica, first]
            it.ids[replica, first] = request
            it.running[replica] += 1
            it.held[replica] += 1
            self.line.ready_s[request] = max(float(self.line.ready_s[request]), at_s)
        return list(requests[space:])

    def pause(self, replica: int, until_s: float) -> None:
        """No step begins before `until_s`."""
        self.replicas.free_s[replica] = max(float(self.replicas.free_s[replica]), until_s)

    def advance(self, until_s: float, slowdown: Array | float = 1.0) -> None:
        """Serve up to `until_s`, every step of a replica taking its `slowdown` times as long."""
        if until_s > self.now_s:
            it, factor = self.replicas, np.broadcast_to(np.asarray(slowdown, dtype=np.float64), self.most)[:, None]
            slowed = it._replace(
                decode_s=it.decode_s * factor, through_s=it.through_s * factor, slowest_s=it.slowest_s * factor
            )
            _advance(self.now_s, until_s, self.line, slowed)
            self.now_s = until_s


@compiled
def _advance(now: float, until: float, line: _Line, it: _Replicas) -> None:
    arriving = int(np.searchsorted(line.arrival_s, now, side="right"))
    _hand_out(now, arriving, line, it)
    while True:
        acting = -1
        moment = until
        for replica in range(len(it.up_s)):
            if it.held[replica] > 0 and it.up_s[replica] <= until:
                at = max(it.free_s[replica], it.up_s[replica])
                if at < moment:
                    acting, moment = replica, at
        starting = np.inf
        if _waiting(arriving, line) >= 0:
            for replica in range(len(it.up_s)):
                if it.accepts[replica] == 1 and it.up_s[replica] > now and it.up_s[replica] < starting:
                    starting = it.up_s[replica]
        arrival = line.arrival_s[arriving] if arriving < len(line.arrival_s) else np.inf
        if min(arrival, starting) <= moment and min(arrival, starting) < until:
            now = min(arrival, starting)
            while arriving < len(line.arrival_s) and line.arrival_s[arriving] <= now:
                arriving += 1
            _hand_out(now, arriving, line, it)
        elif acting < 0:
            return
        else:
            now = max(now, moment)
            if _step(acting, moment, line, it):
                _hand_out(now, arriving, line, it)


@compiled
def _waiting(arrived: int, line: _Line) -> int:
    """The first request that waits, -1 if none does."""
    first = line.cursor[0]
    while first < arrived and line.state[first] != WAITING:
        first += 1
    line.cursor[0] = first
    return first if first < arrived else -1


@compiled
def _hand_out(now: float, arrived: int, line: _Line, it: _Replicas) -> None:
    """What waits goes to the replica with fewest requests, among equals to the one with fewest tokens to go."""
    request = _waiting(arrived, line)
    while request >= 0:
        chosen, least = -1, np.inf
        for replica in range(len(it.up_s)):
            held = it.held[replica]
            if it.up_s[replica] <= now and it.accepts[replica] == 1 and held < it.room[replica]:
                load = held * it.decode_s[replica, min(held + 1, it.room[replica])] * 1e6
                for index in range(held):
                    load += OUTPUT_TOKENS - line.tokens[it.ids[replica, index]]
                load += max(it.free_s[replica] - now, 0.0)
                if load < least:
                    chosen, least = replica, load
        if chosen < 0:
            return
        if it.held[chosen] == 0:
            it.free_s[chosen] = max(it.free_s[chosen], now)
        it.ids[chosen, it.held[chosen]] = request
        it.held[chosen] += 1
        line.state[request] = TAKEN
        request = _waiting(arrived, line)


@compiled
def _step(replica: int, t: float, line: _Line, it: _Replicas) -> bool:
    """One step of a replica; whether a place became free."""
    fresh = it.held[replica] - it.running[replica]
    if fresh > 0 and (it.whole[replica] == 0 or it.running[replica] == 0):
        _prefill(replica, t, min(fresh, MOST_GROUP), line, it)
        return False
    able = 0
    soonest = np.inf
    for index in range(it.running[replica]):
        ready = line.ready_s[it.ids[replica, index]]
        able += ready <= t
        soonest = min(soonest, ready)
    if able == 0:
        it.free_s[replica] = soonest
        return False
    end = t + it.decode_s[replica, able]
    kept = 0
    for index in range(it.running[replica]):
        request = it.ids[replica, index]
        if line.ready_s[request] <= t:
            line.tokens[request] += 1
        if line.tokens[request] >= OUTPUT_TOKENS:
            line.state[request] = DONE
            line.done_s[request] = end
        else:
            it.ids[replica, kept] = request
            kept += 1
    freed = bool(kept < it.running[replica])
    for index in range(fresh):
        it.ids[replica, kept + index] = it.ids[replica, it.running[replica] + index]
    it.running[replica] = kept
    it.held[replica] = kept + fresh
    it.free_s[replica] = end
    return freed


@compiled
def _prefill(replica: int, t: float, group: int, line: _Line, it: _Replicas) -> None:
    """Prompts and whatever tokens there were already; a longer one is charged in proportion."""
    longest = 0
    first = it.running[replica]
    for index in range(first, first + group):
        longest = max(longest, line.tokens[it.ids[replica, index]])
    scale = (INPUT_TOKENS + longest) / INPUT_TOKENS
    for index in range(first, first + group):
        line.ready_s[it.ids[replica, index]] = t + scale * it.through_s[replica, group]
    it.running[replica] += group
    it.free_s[replica] = t + scale * it.slowest_s[replica, group]
