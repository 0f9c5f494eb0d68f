"""Static batches, as SpotServe's engines and its request server run them, compiled.

X. Miao et al., ASPLOS'24, §4, in the form of its artifact: time advances in polling steps; an engine
takes the largest power of two of its own queue, a batch starts and ends together, and nobody is cut
except as the arranger says before the batch starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from planning.static_batch import OUTPUT_TOKENS, StaticBatchProfile, StaticConfig

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

STEP_S = 0.02
WAITING, TAKEN, DONE = 0, 1, 2
_GRACE_S = 30.0
_MARGIN = 1.1  # of the artifact's arranger, see `planning.arrangement`
_ROOM = 64  # requests that one pipeline can hold, running and queued


class BatchTimes(NamedTuple):
    """Seconds by batch size: the whole batch; prefill and one decode step without the model's `factor`."""

    whole_s: Array
    prefill_s: Array
    decode_s: Array
    factor: float

    @classmethod
    def of(cls, profile: StaticBatchProfile, config: StaticConfig) -> BatchTimes:
        """The published formulas; micro-batch counts that do not divide a batch are replaced by 1."""
        sizes = config.batch + 1
        whole, prefill, decode = np.zeros(sizes), np.zeros(sizes), np.zeros(sizes)
        batch = 1
        while batch <= config.batch:
            used = StaticConfig(
                1,
                config.stages,
                config.shards,
                batch,
                config.prefill_micro if batch % config.prefill_micro == 0 else 1,
                config.decode_micro if batch % config.decode_micro == 0 else 1,
            )
            whole[batch] = profile.latency_ms(used) / 1e3
            prefill[batch] = profile.prefill_ms(used, factor=1.0) / 1e3
            decode[batch] = profile.decode_ms(used, factor=1.0) / 1e3
            batch *= 2
        return cls(whole, prefill, decode, profile.factor)


class _Slots(NamedTuple):
    """Arrays over pipelines; `queue` holds the running requests first, then those queued in the engine."""

    up_s: Array
    queue: Ints
    held: Ints
    running: Ints
    end_s: Array
    cut_steps: Ints
    signal_s: Array
    estimate_s: Array
    stopped_s: Array


class _Line(NamedTuple):
    """Arrays over requests in order of arrival, and the first that may be waiting."""

    arrival_s: Array
    state: Ints
    done_s: Array
    cursor: Ints


@dataclass(slots=True)
class Requests:
    """Arrivals in order, whether each is waiting, taken or done, and when it was done."""

    arrival_s: Array
    line: _Line = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.arrival_s)
        states, cursor = np.zeros(count, dtype=np.int64), np.zeros(1, dtype=np.int64)
        self.line = _Line(self.arrival_s, states, np.full(count, inf), cursor)

    @property
    def done_s(self) -> Array:
        """When each request was done; infinite if it was not."""
        return self.line.done_s

    @property
    def all_done(self) -> bool:
        """Whether nothing is left to do."""
        return bool((self.line.state == DONE).all())

    def give_back(self, requests: Sequence[int]) -> None:
        """Put requests back where they were in the order of arrival."""
        for request in requests:
            self.line.state[request] = WAITING
            self.line.cursor[0] = min(int(self.line.cursor[0]), request)


@dataclass(slots=True)
class Pipelines:
    """`count` pipelines of one kind, none of them up at first; `pool` and `fill` are the dispatcher's.

    With `fill` a pipeline is given more while it holds fewer than `pool` requests; without, only when
    it is empty.
    """

    count: int
    times: BatchTimes
    pool: int
    fill: bool
    slots: _Slots = field(init=False)

    def __post_init__(self) -> None:
        never = (np.full(self.count, inf) for _ in range(4))
        none = (np.zeros(self.count, dtype=np.int64) for _ in range(3))
        queue = np.zeros((self.count, _ROOM), dtype=np.int64)
        self.slots = _Slots(
            next(never), queue, next(none), next(none), next(never), next(none), next(never),
            np.zeros(self.count), next(never),
        )  # fmt: skip

    def start(self, slot: int, at_s: float) -> None:
        """A pipeline that serves from `at_s` on, with nothing in it."""
        slots = self.slots
        slots.up_s[slot] = at_s
        slots.signal_s[slot] = slots.stopped_s[slot] = slots.end_s[slot] = inf
        slots.held[slot] = slots.running[slot] = slots.cut_steps[slot] = 0

    def resume(self, slot: int, requests: Sequence[int], steps: int) -> None:
        """Go on with a batch of which `steps` tokens are there already, as soon as the pipeline is up."""
        batch, slots = len(requests), self.slots
        slots.queue[slot, :batch] = requests
        slots.held[slot] = slots.running[slot] = batch
        left_s = self.times.factor * float(self.times.decode_s[batch]) * (OUTPUT_TOKENS - steps)
        slots.end_s[slot] = float(slots.up_s[slot]) + left_s

    def signal(self, slot: int, at_s: float, estimate_s: float) -> None:
        """Stop in time for transfers of `estimate_s` before the deadline, or past it if negative.

        Before every batch the pipeline decides whether it still fits, and up to which step.
        """
        self.slots.signal_s[slot], self.slots.estimate_s[slot] = at_s, estimate_s

    def left_over(self, slot: int) -> tuple[list[int], int]:
        """Requests of the batch that a stopped pipeline did not finish, and its steps."""
        requests = self.slots.queue[slot, : self.slots.running[slot]]
        return [int(request) for request in requests], int(self.slots.cut_steps[slot])

    def remove(self, slot: int) -> list[int]:
        """Take a pipeline away at once; the requests that it still held."""
        lost = [int(request) for request in self.slots.queue[slot, : self.slots.held[slot]]]
        self.start(slot, inf)
        return lost

    @property
    def any_up(self) -> bool:
        """Whether any pipeline serves or will."""
        return bool((np.isfinite(self.slots.up_s) & np.isinf(self.slots.stopped_s)).any())

    def grown(self, count: int) -> Pipelines:
        """The same pipelines, as they are, among `count`."""
        more = Pipelines(count, self.times, self.pool, self.fill)
        for new, old in zip(more.slots, self.slots, strict=True):
            new[: self.count] = old
        return more


def advance(
    pipelines: Pipelines, requests: Requests, now_s: float, until_s: float, watched: Sequence[int] = ()
) -> float:
    """Serve from `now_s` to `until_s`, or until all `watched` pipelines have stopped; returns the moment."""
    watching = np.array(watched, dtype=np.int64)
    return float(
        _advance(
            now_s, until_s, watching, requests.line, pipelines.times, pipelines.slots, pipelines.pool, pipelines.fill
        )
    )


@njit(cache=True)
def _power(most: int) -> int:
    size = 1
    while size * 2 <= most:
        size *= 2
    return size


@njit(cache=True)
def _advance(
    now: float, until: float, watched: Ints, line: _Line, times: BatchTimes, slots: _Slots, pool: int, fill: bool
) -> float:
    """An engine sees its own queue before the request server sees that a batch is done."""
    if not np.isfinite(slots.up_s).any():
        return until
    tick = int(np.ceil(now / STEP_S - 1e-9))
    last = int(np.floor(until / STEP_S + 1e-9))
    while tick <= last:
        t = tick * STEP_S
        for slot in range(len(slots.up_s)):
            _finish(slot, t, line, slots)
            _begin(slot, t, line, times, slots)
        if _all_stopped(watched, slots):
            return t
        _dispatch(t, line, len(times.whole_s) - 1, slots, pool, fill)
        for slot in range(len(slots.up_s)):
            _begin(slot, t, line, times, slots)
        tick = max(tick + 1, _next_tick(t, line, slots))
    return until


@njit(cache=True)
def _next_tick(t: float, line: _Line, slots: _Slots) -> int:
    """The first tick at which anything can happen: while somebody is signalled every tick counts."""
    arriving = np.searchsorted(line.arrival_s, t, side="right")
    soonest = line.arrival_s[arriving] if arriving < len(line.arrival_s) else t + 3600.0
    for slot in range(len(slots.up_s)):
        if slots.stopped_s[slot] == np.inf:
            if slots.signal_s[slot] < np.inf:
                return 0
            if slots.running[slot] > 0:
                soonest = min(soonest, slots.end_s[slot])
            if slots.up_s[slot] > t:
                soonest = min(soonest, slots.up_s[slot])
    return int(np.ceil(min(soonest, t + 3600.0) / STEP_S - 1e-9))


@njit(cache=True)
def _all_stopped(watched: Ints, slots: _Slots) -> bool:
    for slot in watched:
        if slots.stopped_s[slot] == np.inf:
            return False
    return len(watched) > 0


@njit(cache=True)
def _finish(slot: int, t: float, line: _Line, slots: _Slots) -> None:
    """The batch of a pipeline is over: done, or cut short and then the pipeline stops with it."""
    if slots.end_s[slot] > t or slots.running[slot] == 0 or slots.stopped_s[slot] < np.inf:
        return
    count = slots.running[slot]
    if slots.cut_steps[slot] > 0:
        slots.stopped_s[slot] = t
        _return(slot, count, line, slots)
        return
    for index in range(count):
        line.state[slots.queue[slot, index]] = DONE
        line.done_s[slots.queue[slot, index]] = t
    for index in range(count, slots.held[slot]):
        slots.queue[slot, index - count] = slots.queue[slot, index]
    slots.held[slot] -= count
    slots.running[slot] = 0
    slots.end_s[slot] = np.inf


@njit(cache=True)
def _begin(slot: int, t: float, line: _Line, times: BatchTimes, slots: _Slots) -> None:
    """An idle pipeline takes the largest power of two of its queue, as far as its deadline allows."""
    if slots.up_s[slot] > t or slots.running[slot] > 0 or slots.stopped_s[slot] < np.inf:
        return
    batch = 0
    if slots.held[slot] > 0:
        batch = _power(min(slots.held[slot], len(times.whole_s) - 1))
    steps = OUTPUT_TOKENS
    if slots.signal_s[slot] < np.inf:
        steps = _allowed(t, slot, batch, times, slots)
    if steps <= 0:
        slots.stopped_s[slot] = t
        _return(slot, 0, line, slots)
    elif batch > 0:
        slots.running[slot] = batch
        slots.end_s[slot] = t + times.whole_s[batch]
        if steps < OUTPUT_TOKENS:
            slots.cut_steps[slot] = steps
            slots.end_s[slot] = t + times.factor * (times.prefill_s[batch] + steps * times.decode_s[batch])


@njit(cache=True)
def _allowed(t: float, slot: int, batch: int, times: BatchTimes, slots: _Slots) -> int:
    """Decode steps of the next batch, as `planning.arrangement.steps_that_fit` with its stop rule."""
    estimate = slots.estimate_s[slot]
    slot_s = _GRACE_S - estimate - (t - slots.signal_s[slot])
    if slot_s <= _MARGIN * times.prefill_s[1]:
        return 0
    if batch == 0:
        return OUTPUT_TOKENS
    margin = _MARGIN if estimate >= 0 else 1 / _MARGIN
    steps = int((slot_s - margin * times.prefill_s[batch]) / (margin * times.decode_s[batch]))
    return steps - 1 if estimate >= 0 else steps + 1


@njit(cache=True)
def _return(slot: int, keep: int, line: _Line, slots: _Slots) -> None:
    """What a stopping engine has only queued goes back to the request server."""
    for index in range(keep, slots.held[slot]):
        line.state[slots.queue[slot, index]] = WAITING
        line.cursor[0] = min(line.cursor[0], slots.queue[slot, index])
    slots.held[slot] = keep


@njit(cache=True)
def _dispatch(t: float, line: _Line, most: int, slots: _Slots, pool: int, fill: bool) -> None:
    """The request server hands out the largest power of two of what waits, as long as somebody takes it."""
    while True:
        _skip(t, line)
        chosen = _taker(t, slots, pool, fill)
        if chosen < 0:
            return
        waiting = 0
        request = line.cursor[0]
        while request < len(line.arrival_s) and line.arrival_s[request] <= t and waiting < most:
            waiting += line.state[request] == WAITING
            request += 1
        if waiting == 0:
            return
        size = _power(waiting)
        request = line.cursor[0]
        while size > 0:
            if line.state[request] == WAITING:
                line.state[request] = TAKEN
                slots.queue[chosen, slots.held[chosen]] = request
                slots.held[chosen] += 1
                size -= 1
            request += 1


@njit(cache=True)
def _skip(t: float, line: _Line) -> None:
    first = line.cursor[0]
    while first < len(line.arrival_s) and line.state[first] != WAITING and line.arrival_s[first] <= t:
        first += 1
    line.cursor[0] = first


@njit(cache=True)
def _taker(t: float, slots: _Slots, pool: int, fill: bool) -> int:
    """Empty pipelines first; with `fill` also the least loaded one below `pool` requests. -1: nobody."""
    chosen = -1
    for slot in range(len(slots.up_s)):
        if slots.up_s[slot] <= t and slots.stopped_s[slot] == np.inf:
            if slots.held[slot] == 0:
                return slot
            if fill and slots.held[slot] < pool and (chosen < 0 or slots.held[slot] < slots.held[chosen]):
                chosen = slot
    return chosen
