"""Which tokens each step computes: continuous batching with chunked prefill over paged KV.

Older requests come first in everything: they are scheduled first, and when KV runs out the youngest
gives its blocks up and is recomputed later. The oldest therefore always advances, so no request
waits for ever. Stop strings are the controller's business.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data.errors import InvalidInput
from serving.engine.batch import SampledToken, SequenceStep, StepPlan
from serving.engine.blocks import BlockAllocator, blocks_for
from serving.requests import FinishReason, Limits, Sampling, TopLogprob


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What one replica can take: requests holding KV at once, tokens of a step, KV blocks, context length.

    `plans_in_flight` is the number of steps the caller keeps under way at once (pipeline stages);
    running requests are spread over them.
    """

    max_batch: int
    step_tokens: int
    block_tokens: int
    blocks: int
    max_positions: int
    plans_in_flight: int = 1

    def __post_init__(self) -> None:
        if min(self.max_batch, self.step_tokens, self.block_tokens, self.blocks, self.plans_in_flight) < 1:
            raise InvalidInput(f"every limit of {self} must be at least 1")


@dataclass(slots=True)
class ScheduledRequest:
    """A request as its replica runs it. `output` may begin with tokens committed earlier: they are
    prefilled with the prompt, and the next token has output index `len(output)`. The scheduler
    appends to `output`. `deadline_at_s` is on the clock that `schedule` and `expire` are given.
    """

    key: int
    prompt: Sequence[int]
    output: list[int] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    limits: Limits = field(default_factory=Limits)
    deadline_at_s: float | None = None

    @property
    def total_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.prompt) + len(self.output)


@dataclass(frozen=True, slots=True)
class Emission:
    """Something to tell about a request: its token number `index`, or (`token` None) only its end.

    `error` says why a request ended as `abort` without having been asked to.
    """

    key: int
    index: int
    token: int | None = None
    logprob: float = 0.0
    top: tuple[TopLogprob, ...] = ()
    finish: FinishReason | None = None
    error: str = ""


@dataclass(slots=True)
class _Sequence:
    """A request's place in the queue (`order`) and what of it is cached and under way."""

    request: ScheduledRequest
    order: int
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    in_flight: bool = False
    ended: bool = False

    @property
    def remaining(self) -> int:
        """Known tokens not yet cached; at least one, whose logits give the next token."""
        return self.request.total_tokens - self.cached

    @property
    def ready(self) -> bool:
        return not self.in_flight and not self.ended

    def tokens(self, count: int) -> list[int]:
        """The next `count` tokens to compute."""
        prompt, output = self.request.prompt, self.request.output
        stop, split = self.cached + count, len(prompt)
        return [*prompt[self.cached : stop], *output[max(self.cached - split, 0) : max(stop - split, 0)]]


class Scheduler:
    """The queue, the running requests and the KV blocks of one replica. Not thread-safe."""

    def __init__(self, limits: SchedulerLimits, eos_token_ids: Sequence[int]) -> None:
        self._limits = limits
        self._eos = frozenset(eos_token_ids)
        self._allocator = BlockAllocator(limits.blocks)
        self._sequences: dict[int, _Sequence] = {}
        self._running: list[_Sequence] = []
        self._waiting: list[_Sequence] = []
        self._ended: list[Emission] = []
        self._arrivals = 0
        self._steps = 0
        self.preempted = 0
        """How often a request lost its KV to an older one."""

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

    def add(self, request: ScheduledRequest) -> None:
        """Queue a request. One that is complete already, or can never fit, ends at the next `expire`.

        Raises `InvalidInput` for an empty prompt or a key in use.
        """
        sequence = self._register(request)
        if not self._end_if_over(sequence):
            self._waiting.append(sequence)

    def reserve(self, tokens: int) -> list[int] | None:
        """Blocks for a request whose KV is about to be moved in; None if there are too few."""
        count = blocks_for(tokens, self._limits.block_tokens)
        return self._allocator.allocate(count) if self._allocator.can_allocate(count) else None

    def release(self, blocks: Sequence[int]) -> None:
        """Give back a reservation that came to nothing."""
        self._allocator.free(blocks)

    def adopt(self, request: ScheduledRequest, cached_tokens: int, blocks: list[int]) -> None:
        """Run a request whose first `cached_tokens` tokens are in `blocks`, which `reserve` returned.

        The last known token is computed again if it is cached: its logits are needed.
        """
        if cached_tokens > len(blocks) * self._limits.block_tokens:
            raise InvalidInput(f"{cached_tokens} cached tokens do not fit in {len(blocks)} blocks")
        sequence = self._register(request)
        sequence.blocks = list(blocks)
        sequence.cached = min(cached_tokens, request.total_tokens - 1)
        if not self._end_if_over(sequence):
            self._running.append(sequence)

    def abort(self, key: int) -> bool:
        """Forget a request without a word; its KV is free now, or when its step completes. False if unknown."""
        sequence = self._sequences.get(key)
        if sequence is None:
            return False
        self._remove(sequence)
        return True

    def expire(self, now_s: float) -> list[Emission]:
        """Ends that came without a token: deadlines passed by `now_s`, and requests that cannot go on."""
        for sequence in list(self._sequences.values()):
            deadline = sequence.request.deadline_at_s
            if deadline is not None and deadline <= now_s:
                self._end(sequence, "deadline")
        ended, self._ended = self._ended, []
        return ended

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next step, from requests that are in no step under way; None if nothing can be computed now."""
        steps: list[SequenceStep] = []
        budget = self._limits.step_tokens
        most = -(-self._limits.max_batch // self._limits.plans_in_flight)
        for sequence in self._candidates(now_s):
            if not budget or len(steps) == most:
                break
            count = min(sequence.remaining, budget)
            if self._grow(sequence, sequence.cached + count):
                steps.append(self._step(sequence, count))
                budget -= count
        if not steps:
            return None
        self._steps += 1
        return StepPlan(self._steps, steps)

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

    def snapshot(self) -> list[tuple[int, int, list[int]]]:
        """(key, cached tokens, blocks) of running requests; what a step under way adds is not counted."""
        return [
            (sequence.request.key, sequence.cached, list(sequence.blocks))
            for sequence in self._running
            if sequence.cached and not sequence.ended
        ]

    def _register(self, request: ScheduledRequest) -> _Sequence:
        if not request.prompt:
            raise InvalidInput(f"request {request.key} has an empty prompt; give at least one token")
        if request.key in self._sequences:
            raise InvalidInput(f"request {request.key} is being served already")
        sequence = _Sequence(request, self._arrivals)
        self._arrivals += 1
        self._sequences[request.key] = sequence
        return sequence

    def _candidates(self, now_s: float) -> Iterator[_Sequence]:
        """Decoding requests, then those still prefilling, then waiting ones as they are admitted; oldest first."""
        ready = [sequence for sequence in self._running if sequence.ready and not _late(sequence, now_s)]
        ready.sort(key=lambda sequence: (sequence.remaining > 1, sequence.order))
        for sequence in ready:
            if sequence in self._running:  # it may have been preempted for one before it
                yield sequence
        while self._waiting and len(self._running) < self._limits.max_batch:
            if _late(self._waiting[0], now_s) or not self._admit(self._waiting[0]):
                return
            yield self._running[-1]

    def _admit(self, sequence: _Sequence) -> bool:
        """Let the first waiting request in if all it is known to need is free."""
        needed = blocks_for(sequence.request.total_tokens, self._limits.block_tokens)
        if not self._allocator.can_allocate(needed):
            return False
        self._waiting.remove(sequence)
        self._running.append(sequence)
        return True

    def _grow(self, sequence: _Sequence, tokens: int) -> bool:
        """Blocks for `tokens` tokens, from younger requests if need be; False if it has to wait."""
        missing = blocks_for(tokens, self._limits.block_tokens) - len(sequence.blocks)
        while not self._allocator.can_allocate(missing):
            victim = self._youngest_after(sequence)
            if victim is None:
                return False
            self._preempt(victim)
        sequence.blocks += self._allocator.allocate(max(missing, 0))
        return True

    def _youngest_after(self, sequence: _Sequence) -> _Sequence | None:
        younger = [other for other in self._running if other.order > sequence.order and other.ready and other.blocks]
        return max(younger, key=lambda other: other.order, default=None)

    def _preempt(self, sequence: _Sequence) -> None:
        self._running.remove(sequence)
        self._allocator.free(sequence.blocks)
        sequence.blocks, sequence.cached = [], 0
        insort(self._waiting, sequence, key=lambda other: other.order)
        self.preempted += 1

    def _step(self, sequence: _Sequence, count: int) -> SequenceStep:
        request = sequence.request
        sequence.in_flight = True
        return SequenceStep(
            key=request.key,
            start=sequence.cached,
            tokens=sequence.tokens(count),
            blocks=list(sequence.blocks),
            sampling=request.sampling if count == sequence.remaining else None,
            output_index=len(request.output),
        )

    def _emit(self, sequence: _Sequence, drawn: SampledToken) -> Emission:
        request = sequence.request
        index = len(request.output)
        request.output.append(drawn.token)
        finish = self._finish_reason(request)
        if finish is not None:
            self._discard(sequence)
        else:
            self._end_if_over(sequence)
        return Emission(request.key, index, drawn.token, drawn.logprob, tuple(drawn.top), finish)

    def _finish_reason(self, request: ScheduledRequest) -> FinishReason | None:
        limits = request.limits
        last = request.output[-1] if request.output else None
        if last in limits.stop_token_ids or (last in self._eos and not limits.ignore_eos):
            return "stop"
        if len(request.output) >= limits.max_tokens or request.total_tokens >= self._limits.max_positions:
            return "length"
        return None

    def _end_if_over(self, sequence: _Sequence) -> bool:
        """End a request that is complete as it stands, or whose next step needs more KV than there is."""
        reason = self._finish_reason(sequence.request)
        tokens, capacity = sequence.request.total_tokens, self._limits.blocks * self._limits.block_tokens
        if reason is not None:
            self._end(sequence, reason)
        elif tokens > capacity:
            self._end(sequence, "abort", f"{tokens} tokens do not fit in a KV cache of {capacity}; shorten the request")
        return sequence.ended

    def _end(self, sequence: _Sequence, reason: FinishReason, error: str = "") -> None:
        if not sequence.ended:
            request = sequence.request
            self._ended.append(Emission(request.key, len(request.output), finish=reason, error=error))
            self._remove(sequence)

    def _remove(self, sequence: _Sequence) -> None:
        sequence.ended = True
        if not sequence.in_flight:
            self._discard(sequence)

    def _discard(self, sequence: _Sequence) -> None:
        sequence.ended = True
        for queue in (self._running, self._waiting):
            if sequence in queue:
                queue.remove(sequence)
        self._allocator.free(sequence.blocks)
        sequence.blocks = []
        del self._sequences[sequence.request.key]


def _late(sequence: _Sequence, now_s: float) -> bool:
    deadline = sequence.request.deadline_at_s
    return deadline is not None and deadline <= now_s
