"""Waiting for a set of workers to answer within one phase of a reconfiguration."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Generic, TypeVar

from data.layout import Device
from serving.errors import PerennialError

Answer = TypeVar("Answer")


class TransitionFailed(PerennialError):
    """A reconfiguration did not complete; the message says which phase and why."""


class Phase(Generic[Answer]):
    """Collects one answer per expected device; fails as soon as it is told to."""

    def __init__(self, name: str, expected: Iterable[Device]) -> None:
        self.name = name
        self.answers: dict[Device, Answer] = {}
        self._missing = set(expected)
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._finish_if_complete()

    def answer(self, device: Device, answer: Answer) -> None:
        """An expected answer; others are ignored."""
        if device in self._missing:
            self._missing.discard(device)
            self.answers[device] = answer
            self._finish_if_complete()

    def expects(self, device: Device) -> bool:
        """Whether the answer of a worker is still missing."""
        return device in self._missing

    def fail(self, reason: str) -> None:
        """The phase cannot complete."""
        if not self._done.done():
            self._done.set_exception(TransitionFailed(f"{self.name}: {reason}"))
            self._done.exception()  # nobody may be waiting any more, and that is no error

    async def wait(self, timeout_s: float) -> dict[Device, Answer]:
        """All answers. Raises `TransitionFailed`, also when `timeout_s` has passed."""
        try:
            await asyncio.wait_for(asyncio.shield(self._done), timeout_s)
        except TimeoutError:
            missing = ", ".join(str(device) for device in sorted(self._missing))
            raise TransitionFailed(f"{self.name}: no answer from {missing} within {timeout_s:g} s") from None
        return self.answers

    def _finish_if_complete(self) -> None:
        if not self._missing and not self._done.done():
            self._done.set_result(None)
