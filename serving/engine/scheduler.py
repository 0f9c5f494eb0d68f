"""Which tokens each step computes: continuous batching with chunked prefill over paged KV.

Older requests come first in everything: they are scheduled first, and when KV runs out the youngest
gives its blocks up and is recomputed later. The oldest therefore always advances, so no request
waits for ever. Stop strings are the controller's business.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from math import inf

from data.errors import InvalidInput
from serving.engine.batch import SampledToken, StepPlan
from serving.engine.blocks import BlockAllocator, blocks_for
from serving.engine.sequence import Emission, QueuedSequence, ScheduledRequest, SchedulerLimits, StepBudget
from serving.requests import FinishReason

__all__ = ["Emission", "ScheduledRequest", "Scheduler", "SchedulerLimits"]


class Scheduler:
    """The queue, the running requests and the KV blocks of one replica. Not thread-safe."""

    def __init__(self, limits: SchedulerLimits, eos_token_ids: Sequence[int]) -> None:
        self._limits = limits
        self._eos = frozenset(eos_token_ids)
        self._allocator = BlockAllocator(limits.blocks)
        self._sequences: dict[int, QueuedSequence] = {}
        self._running: list[QueuedSequence] = []
        self._waiting: list[QueuedSequence] = []
        self._ended: list[Emission] = []
        self._left: list[int] = []
        self._arrivals = 0
        self._steps = 0
        self._given_up: list[int] = []

    @property
    def running(self) -> int:
        """Requests holding KV blocks or under way."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests holding nothing."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Fraction of the KV blocks in use, 0 to 1."""
        return self._allocator.usage

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute and nothing to tell."""
        return not self._sequences and not self._ended

    @property
    def due_s(self) -> float:
        """The earliest deadline of a request that is here; infinite if none has one."""
        deadlines = (sequence.request.deadline_at_s for sequence in self._sequences.values() if not sequence.ended)
        return min((deadline for deadline in deadlines if deadline is not None), default=inf)

    def add(self, request: ScheduledRequest) -> None:
        """Queue a request. One that is complete already, or can never fit, ends at the next `expire`.

        Raises `InvalidInput` for an empty prompt or a key in use.
        """
        sequence = self._register(request)
        if not self._end_if_over(sequence):
            self._waiting.append(sequence)

    def reserve(self, tokens: int, held: int = 0) -> list[int] | None:
        """Blocks for a request whose KV is about to be moved in, beside `held` that it has already; None if there are
        too few. Every running request keeps a spare one.
        """
        count = blocks_for(tokens, self._limits.block_tokens) - held
        if count <= 0:
            return []
        return self._allocator.allocate(count) if self._allocator.can_allocate(count + len(self._running)) else None

    def claim(self, blocks: Sequence[int]) -> None:
        """Take exactly these blocks for requests whose KV is in them. Raises `ValueError` if one is not free."""
        self._allocator.claim(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Give back a reservation that came to nothing."""
        self._allocator.free(blocks)

    def forget(self, keys: Iterable[int]) -> None:
        """KV of sequences that do not run on it is here: the next plan tells every rank that it is void."""
        self._left += [key for key in keys if key not in self._sequences or not self._sequences[key].blocks]

    def adopt(self, request: ScheduledRequest, cached_tokens: int, blocks: list[int]) -> None:
        """Run a request whose first `cached_tokens` tokens are in `blocks`, which `reserve` returned.

        The last known token is computed again if it is cached: its logits are needed.
        """
        if cached_tokens > len(blocks) * self._limits.block_tokens:
            raise InvalidInput(f"{cached_tokens} cached tokens do not fit in {len(blocks)} blocks")
        sequence = self._register(request)
        self._left = [key for key in self._left if key != request.key]  # its KV is not void any more
        sequence.blocks = list(blocks)
        sequence.cached = min(cached_tokens, request.total_tokens - 1)
        if not self._end_if_over(sequence):
            self._running.append(sequence)

    def abort(self, key: int) -> bool:
        """Forget a request without a word; its KV is free now, or when its step completes. False if unknown."""
        sequence = self._sequences.get(key)
        if sequence is None or sequence.ended:
            return False
        self._remove(sequence)
        return True

    def expire(self, now_s: float) -> list[Emission]:
        """Ends that came without a token: deadlines passed by `now_s`, and requests that cannot go on."""
        for sequence in list(self._sequences.values()):
            if sequence.late(now_s):
                self._end(sequence, "deadline")
        ended, self._ended = self._ended, []
        return ended

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next step, from requests that are in no step under way; None if nothing can be computed now."""
        step = StepBudget(self._limits, len(self._sequences), sum(other.decoding for other in self._running))
        before = len(self._running)
        for sequence in sorted(self._running, key=lambda other: other.order):
            # An earlier one of this loop may have taken its blocks; mostly none has.
            keeps = len(self._running) == before or sequence in self._running
            if keeps and sequence.ready and not sequence.late(now_s):
                self._advance(sequence, step)
        while step.open and self._admit(now_s):
            self._advance(self._running[-1], step)
        if not step.sequences:
            return None
        self._steps += 1
        left, self._left = self._left, []
        return StepPlan(self._steps, step.sequences, left)

    def given_up(self) -> list[int]:
        """Requests that lost their KV to older ones since this was last asked."""
        given_up, self._given_up = self._given_up, []
        return given_up

    def complete(self, plan: StepPlan, sampled: Sequence[SampledToken]) -> list[Emission]:
        """Account for a finished step: `sampled` holds the tokens of its sequences with `sampling` set."""
        drawn = {token.key: token for token in sampled}
        emissions = []
        for step in plan.sequences:
            sequence = self._sequences.get(step.key)
            if sequence is None or not sequence.in_flight:
                continue
            sequence.in_flight = False
            sequence.cached = step.start + len(step.tokens)
            if sequence.ended:
                self._discard(sequence)
            elif step.sampling is not None:
                emissions.append(self._emit(sequence, drawn[step.key]))
        return emissions

    def snapshot(self) -> list[tuple[int, int, list[int], int]]:
        """(key, cached tokens, blocks, life) of running requests; what a step under way adds is not counted."""
        return [
            (sequence.request.key, sequence.cached, list(sequence.blocks), sequence.life)
            for sequence in self._running
            if sequence.cached and not sequence.ended
        ]

    def _register(self, request: ScheduledRequest) -> QueuedSequence:
        if not request.prompt:
            raise InvalidInput(f"request {request.key} has an empty prompt; give at least one token")
        if request.key in self._sequences:
            raise InvalidInput(f"request {request.key} is being served already")
        sequence = QueuedSequence(request, self._arrivals)
        self._arrivals += 1
        self._sequences[request.key] = sequence
        return sequence

    def _advance(self, sequence: QueuedSequence, step: StepBudget) -> None:
        """Put what the budget allows of a sequence into the step, if its KV can be had."""
        count = step.share(sequence)
        if count and self._grow(sequence, sequence.cached + count):
            step.take(sequence.step(count))

    def _admit(self, now_s: float) -> bool:
        """Let the first waiting request in if a place and all the KV it is known to need are free."""
        if not self._waiting or len(self._running) >= self._limits.max_batch:
            return False
        first = self._waiting[0]
        needed = blocks_for(first.request.total_tokens, self._limits.block_tokens)
        if first.late(now_s) or not self._allocator.can_allocate(needed):
            return False
        self._running.append(self._waiting.pop(0))
        return True

    def _grow(self, sequence: QueuedSequence, tokens: int) -> bool:
        """Blocks for `tokens` tokens, from younger requests if need be; False if it has to wait."""
        missing = blocks_for(tokens, self._limits.block_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        while not self._allocator.can_allocate(missing):
            victim = self._youngest_after(sequence)
            if victim is None:
                return False
            self._preempt(victim)
        sequence.blocks += self._allocator.allocate(missing)
        return True

    def _youngest_after(self, sequence: QueuedSequence) -> QueuedSequence | None:
        younger = [other for other in self._running if other.order > sequence.order and other.ready and other.blocks]
        return max(younger, key=lambda other: other.order, default=None)

    def _preempt(self, sequence: QueuedSequence) -> None:
        self._running.remove(sequence)
        self._allocator.free(sequence.blocks)
        sequence.blocks, sequence.cached = [], 0
        sequence.life += 1
        self._left.append(sequence.request.key)
        insort(self._waiting, sequence, key=lambda other: other.order)
        self._given_up.append(sequence.request.key)

    def _emit(self, sequence: QueuedSequence, drawn: SampledToken) -> Emission:
        request = sequence.request
        index = len(request.output)
        request.output.append(drawn.token)
        finish = self._finish_reason(request)
        if finish is not None:
            self._discard(sequence)
        else:
            self._end_if_too_long(sequence)
        return Emission(request.key, index, drawn.token, drawn.logprob, tuple(drawn.top), finish)

    def _finish_reason(self, request: ScheduledRequest) -> FinishReason | None:
        limits = request.limits
        last = request.output[-1] if request.output else None
        if last in limits.stop_token_ids or (last in self._eos and not limits.ignore_eos):
            return "stop"
        if len(request.output) >= limits.max_tokens or request.total_tokens >= self._limits.max_positions:
            return "length"
        return None

    def _end_if_over(self, sequence: QueuedSequence) -> bool:
        """End a request that is complete as it stands, or whose next step needs more KV than there is."""
        reason = self._finish_reason(sequence.request)
        if reason is not None:
            self._end(sequence, reason)
        else:
            self._end_if_too_long(sequence)
        return sequence.ended

    def _end_if_too_long(self, sequence: QueuedSequence) -> None:
        tokens, capacity = sequence.request.total_tokens, self._limits.blocks * self._limits.block_tokens
        if tokens > capacity:
            self._end(sequence, "abort", f"{tokens} tokens do not fit in a KV cache of {capacity}; shorten the request")

    def _end(self, sequence: QueuedSequence, reason: FinishReason, error: str = "") -> None:
        if not sequence.ended:
            request = sequence.request
            self._ended.append(Emission(request.key, len(request.output), finish=reason, error=error))
            self._remove(sequence)

    def _remove(self, sequence: QueuedSequence) -> None:
        sequence.ended = True
        if not sequence.in_flight:
            self._discard(sequence)

    def _discard(self, sequence: QueuedSequence) -> None:
        sequence.ended = True
        for queue in (self._running, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._allocator.free(sequence.blocks)
        sequence.blocks = []
        self._left.append(sequence.request.key)
        del self._sequences[sequence.request.key]
