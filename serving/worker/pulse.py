"""What a worker says of itself with every heartbeat: whether its step loop gets on."""

from __future__ import annotations

import time
from weakref import ref

from serving.messages import Heartbeat
from serving.worker.replica import StepLoop


class Pulse:
    """Watches one step loop after the other; `take` is called at every heartbeat."""

    def __init__(self, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._seen: tuple[object, ...] = ()
        self._seen_at = 0.0
        self._still_s = 0.0

    def take(self, loop: StepLoop | None) -> Heartbeat:
        """The heartbeat to send now.

        A loop is still from the first look that found what the look before had found: no operation ended
        and not a nanosecond computed, with work to do. However late a look is, it adds no more than two
        intervals: this process may have been stopped as a whole, which says nothing of its loop.
        """
        if loop is None:
            self._seen, self._still_s = (), 0.0
            return Heartbeat()
        now, waiting = time.monotonic(), loop.waiting
        # Not the loop itself: the last to let go of it takes a replica down, and would hold up whoever talks.
        seen = (ref(loop), waiting.peer, waiting.ended, loop.cpu_s())
        same = seen == self._seen and loop.is_alive() and not loop.resting
        self._still_s = self._still_s + min(now - self._seen_at, 2 * self._heartbeat_s) if same else 0.0
        self._seen, self._seen_at = seen, now
        return Heartbeat(loop.steps, loop.position.number, self._still_s, waiting.peer)
