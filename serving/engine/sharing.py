"""Whose step is next, where several models share the devices of a group."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from serving.engine.batch import StepPlan
from serving.engine.scheduler import Scheduler

PATIENCE_S = 0.25  # how long a model with work goes without a step because others have earlier deadlines


class Sharing:
    """The schedulers of a group's models, by part. Not thread-safe.

    Each step belongs to one model: the one with the earliest deadline, among equals (or without deadlines)
    the one whose last step is longest ago. Whoever had to wait for longer than `patience_s` goes first, so that
    streams without a deadline move on too.
    """

    def __init__(self, schedulers: Sequence[Scheduler], *, patience_s: float = PATIENCE_S) -> None:
        self.schedulers = tuple(schedulers)
        self._patience_s = patience_s
        self._waits_since_s: list[float | None] = [None] * len(self.schedulers)  # None: it has nothing to do
        self._latest = -1

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next step of whoever's turn it is and can compute something; None if nobody can."""
        for part in self._turns(now_s):
            plan = self.schedulers[part].schedule(now_s)
            if plan is not None:
                self._waits_since_s[part], self._latest = now_s, part
                return msgspec.structs.replace(plan, part=part) if part else plan
        return None

    def _turns(self, now_s: float) -> Sequence[int]:
        """Parts with work, in the order in which they may have the step."""
        if len(self.schedulers) == 1:
            return (0,)
        for part, scheduler in enumerate(self.schedulers):
            since_s = self._waits_since_s[part]
            self._waits_since_s[part] = None if scheduler.idle else now_s if since_s is None else since_s
        busy = [(since_s, part) for part, since_s in enumerate(self._waits_since_s) if since_s is not None]
        return [part for _, part in sorted((self._urgency(since_s, part, now_s), part) for since_s, part in busy)]

    def _urgency(self, since_s: float, part: int, now_s: float) -> tuple[bool, float, float, int]:
        patient = now_s - since_s <= self._patience_s
        after = (part - self._latest - 1) % len(self.schedulers)
        return patient, self.schedulers[part].due_s if patient else since_s, since_s, after
