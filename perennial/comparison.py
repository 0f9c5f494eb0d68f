"""Holding a delivered stream against the stream that it should have been."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from serving.requests import Chunk


@dataclass(frozen=True, slots=True)
class Difference:
    """Tokens lost, delivered twice, and different, of one stream; all 0 when it is the reference."""

    lost: int = 0
    duplicated: int = 0
    mismatched: int = 0

    def __bool__(self) -> bool:
        return bool(self.lost or self.duplicated or self.mismatched)

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            self.lost + other.lost, self.duplicated + other.duplicated, self.mismatched + other.mismatched
        )


def indexed(chunks: Iterable[Chunk]) -> list[tuple[int, int]]:
    """(output position, token) of every token in the order of its delivery."""
    return [(chunk.output_index + offset, token) for chunk in chunks for offset, token in enumerate(chunk.token_ids)]


def compare(reference: Sequence[int], stream: Sequence[tuple[int, int]], *, finished: bool = True) -> Difference:
    """Compare delivered `(output position, token)` pairs with the reference tokens.

    `lost`: positions of the reference that never came, up to the last one delivered when the stream
    was not `finished` (cancelled by its client). `duplicated`: deliveries of a position that had come
    already, or that came after a later one. `mismatched`: deliveries of another token than the
    reference has there, or beyond its end.
    """
    duplicated = mismatched = 0
    seen: set[int] = set()
    furthest = -1
    for position, token in stream:
        if position in seen or position < furthest:
            duplicated += 1
        elif position >= len(reference) or reference[position] != token:
            mismatched += 1
        seen.add(position)
        furthest = max(furthest, position)
    expected = len(reference) if finished else min(len(reference), furthest + 1)
    return Difference(expected - sum(position < expected for position in seen), duplicated, mismatched)


def agreement(reference: Sequence[int], tokens: Sequence[int]) -> float:
    """Share of the reference that the stream repeats before it first differs (1.0 for an empty one)."""
    same = 0
    for expected, token in zip(reference, tokens, strict=False):
        if expected != token:
            break
        same += 1
    return same / len(reference) if reference else 1.0
