"""Whose step is next where several models share the devices of a group: the engine's rule, without its schedulers."""

from __future__ import annotations

from collections.abc import Sequence

PATIENCE_S = 0.25


class Turns:
    """The model with the earliest deadline goes first, among equals the one whose last step is longest ago; but
    whoever had work for `PATIENCE_S` without a step goes before all others.
    """

    def __init__(self, parts: int) -> None:
        self._waits_since_s: list[float | None] = [None] * parts  # None: it has nothing to do
        self._latest = -1

    def order(self, now_s: float, due_s: Sequence[float | None]) -> list[int]:
        """The parts with work, in the order in which they may have the step; `due_s` is None for those without."""
        for part, due in enumerate(due_s):
            since_s = self._waits_since_s[part]
            self._waits_since_s[part] = None if due is None else now_s if since_s is None else since_s
        return [part for _, part in sorted((self._urgency(part, due_s[part], now_s), part) for part in self._busy())]

    def took(self, part: int, now_s: float) -> None:
        """A step of `part` begins."""
        self._waits_since_s[part], self._latest = now_s, part

    def _busy(self) -> list[int]:
        return [part for part, since_s in enumerate(self._waits_since_s) if since_s is not None]

    def _urgency(self, part: int, due_s: float | None, now_s: float) -> tuple[bool, float, float, int]:
        since_s = self._waits_since_s[part]
        assert since_s is not None
        assert due_s is not None
        patient = now_s - since_s <= PATIENCE_S
        after = (part - self._latest - 1) % len(self._waits_since_s)
        return patient, due_s if patient else since_s, since_s, after
