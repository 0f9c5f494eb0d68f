"""What a reconfiguration makes of the time before instances go: how long the old layout decodes, and what moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from data.models import ModelSpec
from planning.arrangement import Carried, Timing, arrange
from serving.controller.records import Record
from serving.settings import Replication

_CHANGE_S = 0.1  # of a change by itself, without its KV
_LONGEST_STEP_S = 0.1


class Grace:
    """The time before the first of some replicas' devices goes; endless where no device was given notice.

    The old layout decodes on while it is `crowded`: while more requests are there than the next layout runs
    at once. Otherwise there is nothing to be had by waiting.
    """

    def __init__(
        self,
        leaving_s: Callable[[], float],
        crowded: Callable[[], bool],
        timing: Timing,
        *,
        margin_s: float,
    ) -> None:
        self._leaving_s, self._crowded = leaving_s, crowded
        self._timing, self._margin_s = timing, margin_s
        self._urged = False

    @property
    def limited(self) -> bool:
        """Whether a device was given notice."""
        return math.isfinite(self._leaving_s())

    def urge(self) -> None:
        """The fleet has changed again: do not wait any longer."""
        self._urged = True

    def waits(self, records: Collection[Record]) -> bool:
        """Whether the replicas that `records` run on should decode on."""
        left_s = self._leaving_s() - self._margin_s
        if self._urged or math.isinf(left_s) or not self._crowded():
            return False
        return arrange(_carried(records), self._timing, left_s).decode_s > 0

    def stay_behind(self, records: Collection[Record]) -> frozenset[int]:
        """Keys of requests whose KV cannot be moved in time, or not sooner than it is computed again."""
        left_s = self._leaving_s()
        if math.isinf(left_s) or left_s <= self._timing.change_s:  # then nothing is lost by trying
            return frozenset()
        return arrange(_carried(records), self._timing, left_s, most_s=0.0).replay


def _carried(records: Collection[Record]) -> list[Carried]:
    return [
        Carried(one.key, len(one.request.prompt) + len(one.output), one.request.limits.max_tokens - len(one.output))
        for one in records
    ]


def timing_of(promised_step_s: float, specs: Sequence[ModelSpec], replication: Replication) -> Timing:
    """What a plan (0: nothing) and the links promise of models; without a promise steps are taken to be long."""
    return Timing(
        step_s=min(promised_step_s or _LONGEST_STEP_S, _LONGEST_STEP_S),
        change_s=_CHANGE_S,
        move_s=max((spec.kv_token_bytes for spec in specs), default=0) / replication.link_bytes_per_s,
        replay_s=1 / replication.prefill_tokens_per_s,
    )
