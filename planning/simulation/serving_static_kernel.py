"""The steps of static batching, compiled: arrays over pipelines and requests, and how they change with time.

X. Miao et al., ASPLOS'24, §4, in the form of its artifact: time advances in polling steps; an engine
takes the largest power of two of its own queue, a batch starts and ends together, and nobody is cut
except as the arranger says before the batch starts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planning.simulation.compiled import compiled
from planning.static_batch import OUTPUT_TOKENS, StaticBatchProfile, StaticConfig

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

STEP_S = 0.02
WAITING, TAKEN, DONE = 0, 1, 2
_GRACE_S = 30.0
_MARGIN = 1.1  # of the artifact's arranger, see `planning.arrangement`


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


class Slots(NamedTuple):
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


class Line(NamedTuple):
    """Arrays over requests in order of arrival, and the first that may be waiting."""

    arrival_s: Array
    state: Ints
    done_s: Array
    cursor: Ints


@compiled
def _power(most: int) -> int:
    size = 1
    while size * 2 <= most:
        size *= 2
    return size


@compiled
def advance_slots(
    now: float, until: float, watched: Ints, line: Line, times: BatchTimes, slots: Slots, pool: int, fill: bool
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


@compiled
def _next_tick(t: float, line: Line, slots: Slots) -> int:
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


@compiled
def _all_stopped(watched: Ints, slots: Slots) -> bool:
    for slot in watched:
        if slots.stopped_s[slot] == np.inf:
            return False
    return len(watched) > 0


@compiled
def _finish(slot: int, t: float, line: Line, slots: Slots) -> None:
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


@compiled
def _begin(slot: int, t: float, line: Line, times: BatchTimes, slots: Slots) -> None:
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


@compiled
def _allowed(t: float, slot: int, batch: int, times: BatchTimes, slots: Slots) -> int:
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


@compiled
def _return(slot: int, keep: int, line: Line, slots: Slots) -> None:
    """What a stopping engine has only queued goes back to the request server."""
    for index in range(keep, slots.held[slot]):
        line.state[slots.queue[slot, index]] = WAITING
        line.cursor[0] = min(line.cursor[0], slots.queue[slot, index])
    slots.held[slot] = keep


@compiled
def _dispatch(t: float, line: Line, most: int, slots: Slots, pool: int, fill: bool) -> None:
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


@compiled
def _skip(t: float, line: Line) -> None:
    first = line.cursor[0]
    while first < len(line.arrival_s) and line.state[first] != WAITING and line.arrival_s[first] <= t:
        first += 1
    line.cursor[0] = first


@compiled
def _taker(t: float, slots: Slots, pool: int, fill: bool) -> int:
    """Empty pipelines first; with `fill` also the least loaded one below `pool` requests. -1: nobody."""
    chosen = -1
    for slot in range(len(slots.up_s)):
        if slots.up_s[slot] <= t and slots.stopped_s[slot] == np.inf:
            if slots.held[slot] == 0:
                return slot
            if fill and slots.held[slot] < pool and (chosen < 0 or slots.held[slot] < slots.held[chosen]):
                chosen = slot
    return chosen
