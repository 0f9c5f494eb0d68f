"""Which points a profile is measured at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec

from data.errors import InvalidInput
from data.models import ModelSpec

PREFILL, DECODE = "prefill", "decode"

_Point = TypeVar("_Point")


class StepPoint(msgspec.Struct, frozen=True):
    """One measurement; the fields are the columns of `data.profile.STEPS`. `layers` is 0 but for part "layers"."""

    phase: str
    part: str
    layers: int
    shards: int
    batch: int
    tokens: int
    context: int


class Grid(msgspec.Struct, frozen=True, kw_only=True):
    """The values that points are combined from.

    Prefill is measured for every batch of `prefill_batches` with every prompt, alone and after
    `chunk_context` cached tokens; decode for every batch with every context. `layers` are numbers of
    decoder layers: two tell the cost of a layer from that of a stage.
    """

    shards: tuple[int, ...]
    layers: tuple[int, ...]
    prefill_batches: tuple[int, ...]
    prompts: tuple[int, ...]
    chunk_context: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    message_bytes: tuple[int, ...]

    @classmethod
    def of(cls, spec: ModelSpec, *, max_shards: int, cuda: bool, max_batch: int = 0) -> Grid:
        """A grid for a model: powers of two up to the shards it allows, lengths up to its context."""
        if max_shards < 1:
            raise InvalidInput(f"a profile needs at least one shard, not {max_shards}")
        most = min(max_shards, spec.heads)
        longest = min(spec.max_positions, 4096 if cuda else 512) - 1
        top = max_batch or (64 if cuda else 8)
        return cls(
            shards=tuple(_powers(most)),
            layers=tuple(sorted({1, min(spec.layers, 4)})),
            prefill_batches=(1, 4) if cuda else (1, 2),
            prompts=_lengths((32, 128, 512, 2048) if cuda else (8, 32, 128), longest),
            chunk_context=longest // 2,
            batches=tuple(batch for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256) if batch <= top),
            contexts=_lengths((64, 512, 2048) if cuda else (16, 96, 256), longest),
            message_bytes=tuple(1 << power for power in ((10, 16, 20, 24, 28) if cuda else (10, 14, 17, 20, 23))),
        )

    def points(self, shards: int, layers: int) -> list[StepPoint]:
        """The layer points of one sharding and depth, corners first: a budget that ends early leaves them."""
        prefill = [(PREFILL, b, n, c) for b in self.prefill_batches for n in self.prompts for c in self._before(b, n)]
        decode = [(DECODE, b, 1, c) for b in self.batches for c in self.contexts]
        return [
            StepPoint(phase, "layers", layers, shards, batch, tokens, context)
            for phase, batch, tokens, context in (*_corners_first(prefill), *_corners_first(decode))
        ]

    def outer_points(self, part: str, shards: int) -> list[StepPoint]:
        """Points of the embedding, the head or the driving cost: by rows of the step, whatever the context."""
        prefill = [(PREFILL, 1, tokens) for tokens in self.prompts]
        decode = [(DECODE, batch, 1) for batch in self.batches]
        return [
            StepPoint(phase, part, 0, shards, batch, tokens, 0)
            for phase, batch, tokens in (*_corners_first(prefill), *_corners_first(decode))
        ]

    @property
    def most_tokens(self) -> int:
        """Tokens that the KV cache must hold at once."""
        prefill = max(self.prefill_batches) * max(self.prompts) + self.chunk_context
        return max(prefill, max(self.batches) * (max(self.contexts) + 1))

    def _before(self, batch: int, tokens: int) -> Iterable[int]:
        """Cached tokens before a prompt: none, and once per length those of an earlier chunk."""
        return (0, self.chunk_context) if batch == 1 and self.chunk_context + tokens <= 2 * self.chunk_context else (0,)


def _powers(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2


def _lengths(wanted: Iterable[int], longest: int) -> tuple[int, ...]:
    return tuple(sorted({min(length, longest) for length in wanted}))


def _corners_first(points: Sequence[_Point]) -> list[_Point]:
    """The first and the last, then the rest from both ends inwards."""
    order = [index for pair in zip(range(len(points)), reversed(range(len(points))), strict=True) for index in pair]
    return [points[index] for index in dict.fromkeys(order)]
