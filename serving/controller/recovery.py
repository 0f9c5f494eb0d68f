"""Requests whose replica broke: they wait until it is known what is left of their KV, or are computed again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Literal

from serving.controller.copies import Copies
from serving.controller.dispatch import Dispatcher, Replica
from serving.controller.ledger import Ledger
from serving.controller.reconfiguration import Stranded
from serving.controller.records import Record
from serving.errors import Aborted
from serving.telemetry import Metrics

logger = logging.getLogger(__name__)

Why = Literal["copied", "uncopied", "unseated"]
"""Of a replayed request: its copy was complete, or was not, when it was hit; or its KV has no room any more."""

_ATTEMPTS = 2  # to restore what a broken replica left, before it is replayed


class Recovery:
    """The broken replicas whose requests may be restored, and the way back into the queue for the others."""

    def __init__(
        self, dispatcher: Dispatcher, ledger: Ledger, metrics: Metrics, copies: Copies, *, most_recoveries: int
    ) -> None:
        self._dispatcher, self._ledger, self._metrics, self._copies = dispatcher, ledger, metrics, copies
        self._most_recoveries = most_recoveries
        self._replayed: list[tuple[Why, int]] = []
        self.stranded: list[Stranded] = []

    def strand(self, replica: Replica) -> None:
        """A replica is no more, and its requests are in nobody's hands."""
        records = {record.key: record for record in self._dispatcher.drop([replica.number])}
        for record in records.values():
            record.replica = None
        copied = self._copies.complete(replica)
        self._copies.ended([replica.number])
        self.stranded.append(Stranded(replica.number, replica.devices, records, copied))

    def failed(self, stranded: Iterable[Stranded]) -> list[int]:
        """An attempt to restore these failed; what several could not restore is settled as by `settle`."""
        for one in stranded:
            one.attempts += 1
        return self.settle([one for one in self.stranded if one.attempts > _ATTEMPTS])

    def settle(self, stranded: Sequence[Stranded], *, tried: bool = False) -> list[int]:
        """Replay what could not be restored of these, for want of room if it was `tried`. Returns their numbers."""
        done = [one.number for one in stranded]
        self.stranded = [one for one in self.stranded if one.number not in done]
        for one in stranded:
            left = [record.request.request_id for record in one.records.values()]
            logger.info("of replica %d %s are replayed", one.number, left or "none")
            self.replay(list(one.records.values()), "unseated" if tried else lost_with(one))
        return done

    def replay(self, records: Sequence[Record], why: Why) -> None:
        """Queue requests to be recomputed from their journalled tokens; give up on the unlucky."""
        kept = []
        for record in records:
            if record.finish is not None:
                continue
            record.recoveries += 1
            if record.recoveries > self._most_recoveries:
                self._give_up(record)
                continue
            self._metrics.replayed(len(record.request.prompt) + len(record.output))
            self._replayed.append((why, max(0, len(record.output) - record.replayed)))
            record.replayed = len(record.output)
            kept.append(record)
        self._metrics.migration("replay", len(kept))
        self._dispatcher.requeue(kept)

    def _give_up(self, record: Record) -> None:
        record.failure = Aborted(
            f"given up after {record.recoveries - 1} recoveries with {len(record.output)} tokens delivered",
            tokens=len(record.output),
        )
        self._ledger.end(record, "abort")

    def replayed(self) -> list[tuple[Why, int]]:
        """Requests queued to be recomputed since this was last asked: why, and how many tokens they had generated.

        Tokens that were being computed again anyway are not counted twice.
        """
        replayed, self._replayed = self._replayed, []
        return replayed


def lost_with(stranded: Stranded) -> Why:
    """Why requests of a broken replica are replayed, if nothing is left of their KV."""
    return "copied" if stranded.copied else "uncopied"
