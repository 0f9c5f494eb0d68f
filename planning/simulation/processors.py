"""Processors with more stages to compute than there are of them: some stand still for a while.

A system's scheduler does not share processors evenly over hundredths of a second: of three workers on two processors
one may have none for a tenth of a second. Means do not show that, and the slowest of a hundred requests do. Stages of a
pipeline are spared: who sleeps between its steps is let in as soon as it wakes up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from random import Random

from planning.step_laws import StepLaw

_SPELL_S = 0.03  # for which a stage keeps what it was dealt, on average


@dataclass(slots=True)
class Processors:
    """`count` of them; with 0 all stages are as slow as the law says for their number, and none ever stands still.

    Where more stages compute, a replica of one stage has a processor for a part of the time, and is as quick then as if
    there were no more stages than processors. That part is such that on average it is as slow as the law says.
    """

    count: int = 0
    seed: int = 0
    _left_s: float = _SPELL_S
    _luck: dict[int, float] = field(default_factory=dict)  # by replica
    _source: Random = field(init=False)

    def __post_init__(self) -> None:
        self._source = Random(self.seed)

    def slow(self, replica: int, stages: int, law: StepLaw, busy: int) -> float:
        """By how much longer than alone a stage of a replica takes now that so many compute; infinite: not at all."""
        if not self._crowded(busy) or stages > 1:
            return law.slow(busy)
        if replica not in self._luck:
            self._luck[replica] = self._source.random()
        quick = law.slow(self.count)
        return quick if self._luck[replica] * law.slow(busy) <= quick else inf

    def until_dealt_s(self, busy: int) -> float:
        """Seconds until it changes who has a processor."""
        return self._left_s if self._crowded(busy) else inf

    def spend(self, seconds: float) -> None:
        """Let time pass, no more than until it changes where that makes a difference."""
        self._left_s -= seconds
        if self._left_s <= 0.0:
            self._left_s = self._source.expovariate(1.0 / _SPELL_S)
            self._luck.clear()

    def _crowded(self, busy: int) -> bool:
        return 0 < self.count < busy
