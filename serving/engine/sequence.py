"""What the scheduler works on: its limits, requests, sequences, and what it has to tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from data.errors import InvalidInput
from serving.engine.batch import SequenceStep
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


@dataclass(slots=True, eq=False)
class QueuedSequence:
    """A request's place in the queue (`order`) and what of it is cached and under way."""

    request: ScheduledRequest
    order: int
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    in_flight: bool = False
    ended: bool = False
    life: int = 0  # grows when its KV is given up, to be computed again

    @property
    def remaining(self) -> int:
        """Known tokens not yet cached; at least one, whose logits give the next token."""
        # Spelt out here and below: they are asked for every sequence several times a step.
        return len(self.request.prompt) + len(self.request.output) - self.cached

    @property
    def ready(self) -> bool:
        """Whether the next step may compute it."""
        return not self.in_flight and not self.ended

    def late(self, now_s: float) -> bool:
        """Whether its deadline has passed."""
        return self.request.deadline_at_s is not None and self.request.deadline_at_s <= now_s

    @property
    def decoding(self) -> bool:
        """Whether the next step of it is a single token whose logits are wanted."""
        return not self.in_flight and not self.ended and self.remaining == 1

    def step(self, count: int) -> SequenceStep:
        """The step that computes the next `count` tokens; from now on it is in flight."""
        self.in_flight = True
        return SequenceStep(
            key=self.request.key,
            start=self.cached,
            tokens=self._tokens(count),
            blocks=list(self.blocks),
            sampling=self.request.sampling if count == self.remaining else None,
            output_index=len(self.request.output),
        )

    def _tokens(self, count: int) -> list[int]:
        prompt, output = self.request.prompt, self.request.output
        stop, split = self.cached + count, len(prompt)
        return [*prompt[self.cached : stop], *output[max(self.cached - split, 0) : max(stop - split, 0)]]


class StepBudget:
    """Tokens and sequences a step has room for. Prefill leaves one token for every decoding sequence."""

    def __init__(self, limits: SchedulerLimits, sequences: int, decoding: int) -> None:
        self.sequences: list[SequenceStep] = []
        self._tokens, self._decoding = limits.step_tokens, decoding
        self._most = -(-min(limits.max_batch, sequences) // limits.plans_in_flight)

    @property
    def open(self) -> bool:
        """Whether there is room left."""
        return self._tokens > 0 and len(self.sequences) < self._most

    def share(self, sequence: QueuedSequence) -> int:
        """How many tokens of a sequence the step takes."""
        if not self.open:
            return 0
        if sequence.decoding:
            self._decoding -= 1
            return 1
        kept = min(max(self._decoding, 0), self._tokens - 1)
        return min(sequence.remaining, self._tokens - kept)

    def take(self, step: SequenceStep) -> None:
        """Add a sequence's part."""
        self.sequences.append(step)
        self._tokens -= len(step.tokens)
