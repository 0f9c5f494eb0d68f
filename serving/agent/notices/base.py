"""What a notice source is, and the loop that keeps one going whatever it meets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from serving.errors import PerennialError

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 10.0  # a third of the shortest notice that any cloud gives
_DOUBLINGS = 10


@dataclass(frozen=True, slots=True)
class Notice:
    """The instance will be gone in `deadline_s` seconds from now."""

    deadline_s: float
    source: str


@dataclass(frozen=True, slots=True)
class Advice:
    """The instance is likelier to go than others: prepare, but stay."""

    source: str


Signal = Notice | Advice


@dataclass(frozen=True, slots=True)
class Sighting:
    """A signal that is in force; its `key` stays the same as long as nothing about it changes."""

    key: str
    signal: Signal


class SourceFailed(PerennialError):
    """A source could not be asked, or its answer makes no sense; the next poll may do better."""


class Source(Protocol):
    """Somebody who knows that this instance will go. Polled every `period_s`."""

    name: str
    period_s: float

    def poll(self) -> AsyncIterator[Sighting]:
        """Everything in force now, most urgent first. Ends by itself in bounded time; raises `SourceFailed`."""

    async def release(self) -> None:
        """The instance holds nothing any more: whoever waits for that may hear it. Raises `SourceFailed`."""


async def watch(source: Source) -> AsyncIterator[Signal]:
    """What `source` says, each thing once, without end.

    A failure is logged when it begins and when it is over; meanwhile polls become rarer, down to one in
    ten seconds. What was withdrawn and comes back is said again.
    """
    said: set[str] = set()
    failures = 0
    while True:
        seen: set[str] = set()
        try:
            async for sighting in source.poll():
                seen.add(sighting.key)
                if sighting.key not in said:
                    said.add(sighting.key)
                    yield sighting.signal
            _report_end(source.name, failures, said - seen)
            said, failures = seen, 0
        except Exception as error:  # noqa: BLE001 - whatever a source does, the instance lives on
            _report_failure(source.name, failures, error)
            failures += 1
        await asyncio.sleep(_pause_s(source.period_s, failures))


def _pause_s(period_s: float, failures: int) -> float:
    return min(period_s * 2 ** min(failures, _DOUBLINGS), max(period_s, _LONGEST_PAUSE_S))


def _report_failure(name: str, failures: int, error: Exception) -> None:
    if not failures:
        unforeseen = None if isinstance(error, SourceFailed) else error
        logger.warning("no notices from %s for now: %s", name, error or type(error), exc_info=unforeseen)


def _report_end(name: str, failures: int, withdrawn: set[str]) -> None:
    if failures:
        logger.warning("%s answers again after %d failures", name, failures)
    for key in sorted(withdrawn):
        logger.warning("%s withdrew %s; what was begun because of it goes on", name, key)
