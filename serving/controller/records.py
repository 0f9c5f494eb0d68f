"""A request's life in the controller: its tokens, its text, and those who listen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from planning.load import Work
from serving.controller.journal import Segment
from serving.errors import Aborted, DeadlineExceeded
from serving.messages import Assignment, Emission
from serving.requests import Chunk, FinishReason, GenerationRequest, TopLogprob

logger = logging.getLogger(__name__)


class TextScanner:
    """Turns tokens into text piece by piece and finds stop strings.

    Text that might be the beginning of a stop string is held back until the next token decides; the
    stop string itself is never released. A pure function of the tokens, so a resumed stream reads alike.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._decoder, self._complained = DecodeStream(skip_special_tokens=True), False
        self._held = ""
        self._hold = max((len(text) for text in stop), default=1) - 1

    def push(self, token: int) -> tuple[str, bool]:
        """Text released by this token, and whether a stop string was completed."""
        self._held += self._text(token)
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            released, self._held = self._held[: min(found)], ""
            return released, True
        keep = len(self._held) - self._hold
        released, self._held = (self._held[:keep], self._held[keep:]) if keep > 0 else ("", self._held)
        return released, False

    def _text(self, token: int) -> str:
        """What a token adds; nothing if the tokenizer fails at it, for a stream is its tokens first."""
        try:
            return self._decoder.step(self._tokenizer, token) or ""
        except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception
            if not self._complained:
                logger.warning("the tokenizer has no text for token %d: %s", token, error)
            self._decoder, self._complained = DecodeStream(skip_special_tokens=True), True
            return ""

    def flush(self) -> str:
        """What was held back, once no token follows."""
        released, self._held = self._held, ""
        return released


@dataclass(slots=True, eq=False)
class Record:
    """One request. `output` may run ahead of `committed`, the number of tokens safe in the journal;
    only committed ones are delivered. `replica` is the replica that works on it, if any.
    """

    key: int
    request: GenerationRequest
    admitted_at: float  # event loop time
    deadline_at: float | None
    scanner: TextScanner | None
    told_at: float = 0.0  # event loop time of the latest commit of tokens; of the admission before that
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[TopLogprob, ...]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    rest: str = ""  # text that was held back until `finish`
    finish: FinishReason | None = None
    committed: int = 0
    ended: bool = False  # `finish` is committed too
    replica: int | None = None
    recoveries: int = 0
    homes: set[int] = field(default_factory=set)  # replicas that have worked on it: what they left is its KV
    replayed: int = 0  # tokens of `output` that were known when it was last computed from its first token on
    listeners: int = 0
    orphaned_at: float | None = None
    failure: Exception | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def model(self) -> str:
        """The name of the model that it asks for."""
        return self.request.model

    @property
    def work(self) -> Work:
        """What is left to do at most; the prompt has been prefilled once there is output."""
        request = self.request
        return Work(0 if self.output else len(request.prompt), request.limits.max_tokens - len(self.output))

    def append(self, emission: Emission) -> None:
        """Take the next token (its index must be `len(output)`) and any finish it brings."""
        assert emission.token is not None
        self.output.append(emission.token)
        self.logprobs.append(emission.logprob)
        self.top.append(tuple(emission.top))
        text, stopped = self.scanner.push(emission.token) if self.scanner else ("", False)
        self.pieces.append(text)
        finish: FinishReason | None = "stop" if stopped else emission.finish
        if finish is not None:
            self.close(finish)

    def close(self, finish: FinishReason) -> None:
        """No token follows."""
        self.finish = finish
        if self.scanner is not None:
            self.rest = self.scanner.flush()

    def segment(self, start: int) -> Segment:
        """The tokens from `start` on, as the journal stores them."""
        return Segment(self.output[start:], self.logprobs[start:], [list(top) for top in self.top[start:]])

    def assignment(self, now: float) -> Assignment:
        """What a leader needs to continue this request."""
        request = self.request
        return Assignment(
            key=self.key,
            prompt=list(request.prompt),
            output=list(self.output),
            sampling=request.sampling,
            limits=request.limits,
            deadline_s=None if self.deadline_at is None else max(0.0, self.deadline_at - now),
        )

    def notify(self) -> None:
        """Wake every listener."""
        self.changed.set()
        self.changed = asyncio.Event()

    def chunk(self, start: int) -> Chunk:
        """The committed tokens from `start` on."""
        stop = self.committed
        wanted = self.request.sampling.logprobs > 0
        return Chunk(
            output_index=start,
            token_ids=tuple(self.output[start:stop]),
            text="".join(self.pieces[start:stop]) + (self.rest if self.ended else ""),
            logprobs=tuple(self.logprobs[start:stop]),
            top=tuple(self.top[start:stop]) if wanted else (),
            finish=self.finish if self.ended else None,
        )

    async def chunks(self, start: int) -> AsyncGenerator[Chunk, None]:
        """Committed tokens from `start` on, as they come; ends after the chunk with `finish`.

        Raises `DeadlineExceeded`, or `Aborted` with the count of tokens, if the request ended so.
        """
        while True:
            changed = self.changed
            if self.committed > start or self.ended:
                chunk = self.chunk(start)
                start += len(chunk.token_ids)
                if chunk.token_ids or chunk.finish in ("stop", "length"):
                    yield chunk
                if chunk.finish is not None:
                    self._raise_for(chunk.finish)
                    return
            else:
                await changed.wait()

    def _raise_for(self, finish: FinishReason) -> None:
        if self.failure is not None:
            raise self.failure
        if finish == "deadline":
            raise DeadlineExceeded(f"the deadline passed after {len(self.output)} tokens")
        if finish == "abort":
            raise Aborted(f"the request was aborted after {len(self.output)} tokens", tokens=len(self.output))
