"""Which sequences have KV in a cache, as the plans of its replica tell every rank."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from serving.engine.batch import StepPlan

_LONG_TOKENS = 256  # computed at once: to wait until these are copied would hold everybody up
_EARLY, _OVERDUE = 0.4, 1.5  # of the time from one step to the next


class Mark(Protocol):
    """A point of what a device has been given to do; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether the device has been through it."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Cached(NamedTuple):
    """The first `tokens` tokens of a sequence are in `blocks`; `life` is another one after the KV was given up."""

    tokens: int
    blocks: tuple[int, ...]
    life: int


class Kept(NamedTuple):
    """The first `tokens` tokens of a sequence, in that `life` of it, are in the copy."""

    life: int
    tokens: int


class Tempo(NamedTuple):
    """When the last step was launched, and how long after the one before; seconds of one clock."""

    last_s: float = -math.inf
    every_s: float = math.inf

    def step(self, now_s: float) -> Tempo:
        """After a step that was launched at `now_s`."""
        return Tempo(now_s, now_s - self.last_s)

    def early(self, now_s: float, takes_s: float) -> bool:
        """Whether something that keeps others waiting, and takes so long, may begin: it is through before the next step
        is launched, or the step has just begun, or no step follows as those before did.
        """
        since_s = now_s - self.last_s
        return since_s <= max(_EARLY * self.every_s, self.every_s - takes_s) or since_s > _OVERDUE * self.every_s


class Look(NamedTuple):
    """Sequences as somebody saw them after so many `changes`; to be read once the device has passed `mark`."""

    cached: dict[int, Cached]
    mark: Mark | None
    changes: int
    tempo: Tempo


class KvIndex:
    """Kept by the step loop, read by whoever copies. Safe to use from any thread.

    A token counts once it has been computed here. What a failure leaves on all ranks together is the least
    that any of them counts.

    The index also knows which sequences are *behind*: those whose KV was here before its copy began, until
    the copy is complete for the first time. Nothing waits for these, nor for who has just got a long prompt: it
    catches up meanwhile.

    What was computed before the last step is *settled*: nobody who copies it has to wait for the device. Without a
    mark the last step is settled too. Steps whose mark the device has not passed are *under way*: a device that
    stands still may have any number of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[int, Cached] = {}
        self._behind: set[int] = set()
        self._catching_up: set[int] = set()
        self._fresh: dict[int, int] = {}  # of the last step: how many tokens there were before it
        self._under_way: deque[tuple[Mark, dict[int, int]]] = deque()  # how many tokens there were before each step
        self._settled_mark: Mark | None = None
        self._changes = 0
        self._tempo = Tempo()
        self._hurry = self._launching = False
        self._lives = self._restarts = 0
        self.mark: Mark | None = None
        self._changed = threading.Condition(self._lock)

    def begin(self, plan: StepPlan) -> None:
        """Before a step is computed: its blocks belong to its sequences from now on."""
        with self._lock:
            self._launching = True
            for key in plan.ended:
                self._forget(key)
            for one in plan.sequences:
                if one.start == 0:  # whatever was here of it is void
                    self._forget(one.key)
                elif one.key not in self._entries:  # it was taken for void
                    self._behind.add(one.key)
                if len(one.tokens) > _LONG_TOKENS:
                    self._catching_up.add(one.key)
                self._set(one.key, one.start, one.blocks)

    def _forget(self, key: int) -> None:
        self._entries.pop(key, None)
        self._behind.discard(key)
        self._catching_up.discard(key)

    def finish(self, plan: StepPlan, mark: Mark | None = None) -> None:
        """After it: its tokens count.

        `mark` is what a reader has to wait for before the KV of this step is in memory (a CUDA event).
        """
        with self._changed:
            self._launching = False
            self._settled_mark, self.mark = self.mark, mark
            self._tempo = self._tempo.step(time.monotonic())
            self._fresh = {one.key: one.start for one in plan.sequences}
            while self._under_way and self._under_way[0][0].query():
                self._under_way.popleft()
            if mark is not None:
                self._under_way.append((mark, self._fresh))
            for one in plan.sequences:
                if one.key in self._entries:
                    self._set(one.key, one.start + len(one.tokens), one.blocks)
            self._change()

    def _change(self) -> None:
        self._changes += 1
        self._changed.notify_all()

    def adopt(self, key: int, tokens: int, blocks: Sequence[int]) -> None:
        """A sequence whose KV was moved in, all at once."""
        with self._changed:
            self._entries.pop(key, None)
            self._set(key, tokens, blocks)
            self._behind.add(key)
            self._restarts += 1
            self._change()

    # -- how far the copy is --------------------------------------------------------------------------

    def start_over(self, keys: Iterable[int] | None = None) -> None:
        """The copies of these sequences, or of all that are here, are not complete."""
        with self._lock:
            self._restarts += 1
            self._behind |= self._entries.keys() if keys is None else self._entries.keys() & set(keys)

    def follow(self, kept: Mapping[int, Kept]) -> None:
        """What has been copied of sequences; who has it all is not behind any more."""
        with self._lock:
            for key in (self._behind | self._catching_up) & kept.keys():
                if self._tokens(key, kept) >= self._entries[key].tokens - 2:
                    self._behind.discard(key)
                    self._catching_up.discard(key)

    def late(self, wanted: Mapping[int, int], kept: Mapping[int, Kept]) -> list[int]:
        """Sequences of whose copy fewer tokens than `wanted` are there, but for those that are behind anyway."""
        with self._lock:
            entries, spared = self._entries, self._behind | self._catching_up
            return [
                key
                for key, tokens in wanted.items()
                if key in entries and key not in spared and self._tokens(key, kept) < tokens
            ]

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
            self._entries[key] = Cached(tokens, tuple(blocks), self._lives)
        else:  # within a life blocks are only added
            same = len(known.blocks) == len(blocks)
            self._entries[key] = Cached(tokens, known.blocks if same else tuple(blocks), known.life)

    def snapshot(self) -> dict[int, Cached]:
        """All sequences."""
        with self._lock:
            return dict(self._entries)

    def computed(self) -> dict[int, Cached]:
        """All sequences, as far as the device has been through their steps: what a failure leaves."""
        with self._lock:
            entries = dict(self._entries)
            for mark, starts in self._under_way:
                for key, tokens in starts.items() if not mark.query() else ():
                    if key in entries and tokens < entries[key].tokens:
                        entries[key] = entries[key]._replace(tokens=tokens)
            return entries

    @property
    def at_rest(self) -> bool:
        """Whether the device has been through every step so far. A step that was begun and not finished may be there in
        part, also if that failed.
        """
        return not self._launching and (self.mark is None or self.mark.query())

    def catch_up(self) -> None:
        """Wait until the device has been through every step so far."""
        if self.mark is not None:
            self.mark.synchronize()

    # -- for whoever copies ---------------------------------------------------------------------------

    def look(self, *, all_of_it: bool) -> Look:
        """What there is to copy: what is settled, or everything."""
        with self._lock:
            everything = all_of_it or self._hurry or self.mark is None
            self._hurry = False
            entries = dict(self._entries)
            if everything:
                return Look(entries, self.mark, self._changes, self._tempo)
            for key, tokens in self._fresh.items():
                if key in entries:
                    entries[key] = entries[key]._replace(tokens=tokens)
            return Look(entries, self._settled_mark, self._changes, self._tempo)

    def unchanged(self, since: Iterable[tuple[int, Cached]]) -> bool:
        """Whether all that was seen of sequences is still there."""
        with self._lock:
            entries = self._entries
            return all(key in entries and entries[key].life == one.life for key, one in since)

    def nudge(self, *, hurry: bool = False) -> None:
        """Whoever copies should look again; in a `hurry` at everything, because somebody waits for it."""
        with self._changed:
            self._hurry |= hurry
            self._change()

    def wait(self, since: int, timeout_s: float) -> bool:
        """Until there is more than when `changes` were `since`, for `timeout_s` at most; whether there is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._changes != since, timeout_s)
