"""Static batches, as SpotServe's engines and its request server run them.

X. Miao et al., ASPLOS'24, §4, in the form of its artifact. The steps themselves are compiled, in
`planning.simulation.serving_static_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
import numpy.typing as npt

from planning.simulation.serving_static_kernel import DONE, WAITING, BatchTimes, Line, Slots, advance_slots
from planning.static_batch import OUTPUT_TOKENS

Array = npt.NDArray[np.float64]

_ROOM = 64  # requests that one pipeline can hold, running and queued


@dataclass(slots=True)
class Requests:
    """Arrivals in order, whether each is waiting, taken or done, and when it was done."""

    arrival_s: Array
    line: Line = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.arrival_s)
        states, cursor = np.zeros(count, dtype=np.int64), np.zeros(1, dtype=np.int64)
        self.line = Line(self.arrival_s, states, np.full(count, inf), cursor)

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
    slots: Slots = field(init=False)

    def __post_init__(self) -> None:
        never = (np.full(self.count, inf) for _ in range(4))
        none = (np.zeros(self.count, dtype=np.int64) for _ in range(3))
        queue = np.zeros((self.count, _ROOM), dtype=np.int64)
        self.slots = Slots(
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
        advance_slots(
            now_s, until_s, watching, requests.line, pipelines.times, pipelines.slots, pipelines.pool, pipelines.fill
        )
    )
