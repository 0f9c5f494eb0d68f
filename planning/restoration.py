"""How much of a sequence's KV is left after a failure, and whether bringing it back beats computing it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.models import ModelSpec
from planning.resharding import KvBox


@dataclass(frozen=True, slots=True)
class Rates:
    """What bringing KV back and computing it cost: bytes per second of a link, tokens per second of prefill."""

    link_bytes_per_s: float
    prefill_tokens_per_s: float


def restorable_tokens(spec: ModelSpec, held: Sequence[tuple[KvBox, int]]) -> int:
    """The longest prefix of which every layer and KV head is held somewhere; `held` are boxes and their tokens.

    The watermark is per request: no other request, and no slower part of another one, lowers it.
    """
    cells = np.zeros((spec.layers, spec.kv_heads), dtype=np.int64)
    for box, tokens in held:
        part = cells[slice(*box.layers), slice(*box.heads)]
        np.maximum(part, tokens, out=part)
    return int(cells.min())


def worth_restoring(kv_bytes: int, tokens: int, rates: Rates) -> bool:
    """Whether moving `kv_bytes` is quicker than computing `tokens` again (dejavu.md, section 4.6)."""
    return kv_bytes / rates.link_bytes_per_s < tokens / rates.prefill_tokens_per_s


def holder(own: str, candidates: Sequence[tuple[str, int]], after: int = 0) -> int | None:
    """Index of the candidate that keeps the copies of an instance `own`; None if all are on that instance.

    Candidates are (instance, copies kept already). The least loaded is taken; among equals the next one
    in the ring, counted from `after`.
    """
    ring = [
        (load, (index - after) % len(candidates), index) for index, (name, load) in enumerate(candidates) if name != own
    ]
    return min(ring)[2] if ring else None
