"""Which sequences have KV in a cache, as the plans of its replica tell every rank."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving.engine.batch import StepPlan


@dataclass(frozen=True, slots=True)
class Cached:
    """The first `tokens` tokens of a sequence are in `blocks`; `life` is another one after the KV was given up."""

    tokens: int
    blocks: tuple[int, ...]
    life: int


class Kept(NamedTuple):
    """The first `tokens` tokens of a sequence, in that `life` of it, are in the copy."""

    life: int
    tokens: int


class KvIndex:
    """Kept by the step loop, read by whoever copies. Safe to use from any thread.

    A token counts once it has been computed here. What a failure leaves on all ranks together is the least
    that any of them counts.

    The index also knows which sequences are *behind*: those whose KV was here before its copy began, until
    the copy is complete for the first time. Nothing waits for these.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[int, Cached] = {}
        self._behind: set[int] = set()
        self._lives = self._restarts = 0
        self.mark: object = None
        self._changed = threading.Condition(self._lock)

    def begin(self, plan: StepPlan) -> None:
        """Before a step is computed: its blocks belong to its sequences from now on."""
        with self._lock:
            for key in plan.ended:
                self._entries.pop(key, None)
                self._behind.discard(key)
            for one in plan.sequences:
                if one.start == 0:  # whatever was here of it is void
                    self._entries.pop(one.key, None)
                    self._behind.discard(one.key)
                self._set(one.key, one.start, one.blocks)

    def finish(self, plan: StepPlan, mark: object = None) -> None:
        """After it: its tokens count.

        `mark` is what a reader has to wait for before the KV of this step is in memory (a CUDA event).
        """
        with self._changed:
            self.mark = mark
            for one in plan.sequences:
                if one.key in self._entries:
                    self._set(one.key, one.start + len(one.tokens), one.blocks)
            self._changed.notify_all()

    def adopt(self, key: int, tokens: int, blocks: Sequence[int]) -> None:
        """A sequence whose KV was moved in, all at once."""
        with self._changed:
            self._entries.pop(key, None)
            self._set(key, tokens, blocks)
            self._behind.add(key)
            self._restarts += 1
            self._changed.notify_all()

    # -- how far the copy is --------------------------------------------------------------------------

    def start_over(self, keys: Iterable[int] | None = None) -> None:
        """The copies of these sequences, or of all that are here, are not complete."""
        with self._lock:
            self._restarts += 1
            self._behind |= self._entries.keys() if keys is None else self._entries.keys() & set(keys)

    def follow(self, kept: Mapping[int, Kept]) -> None:
        """What has been copied of sequences; who has it all is not behind any more."""
        with self._lock:
            for key in self._behind & kept.keys():
                if self._tokens(key, kept) >= self._entries[key].tokens - 1:
                    self._behind.discard(key)

    def late(self, wanted: Mapping[int, int], kept: Mapping[int, Kept]) -> list[int]:
        """Sequences of whose copy fewer tokens than `wanted` are there, but for those that are behind anyway."""
        with self._lock:
            own = wanted.keys() & self._entries.keys() - self._behind
            return [key for key in own if self._tokens(key, kept) < wanted[key]]

    @property
    def copying(self) -> tuple[int, bool]:
        """How often a copy had to start over, and whether all are complete now."""
        with self._lock:
            return self._restarts, not self._behind

    def _tokens(self, key: int, kept: Mapping[int, Kept]) -> int:
        one = kept.get(key)
        return one.tokens if one is not None and one.life == self._entries[key].life else 0

    def _set(self, key: int, tokens: int, blocks: Sequence[int]) -> None:
        known = self._entries.get(key)
        if known is None:
            self._lives += 1
        self._entries[key] = Cached(tokens, tuple(blocks), self._lives if known is None else known.life)

    def snapshot(self) -> dict[int, Cached]:
        """All sequences."""
        with self._lock:
            return dict(self._entries)

    def unchanged(self, key: int, since: Cached) -> bool:
        """Whether what `since` said is still there."""
        with self._lock:
            now = self._entries.get(key)
            return now is not None and now.life == since.life

    def wait(self, timeout_s: float) -> None:
        """Until something was computed, for `timeout_s` at most."""
        with self._changed:
            self._changed.wait(timeout_s)
