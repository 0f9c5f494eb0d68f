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


def apart(here: str, there: str) -> bool:
    """Whether two instances are known to be in different zones; "" is a zone that nobody told."""
    return bool(here and there and here != there)


@dataclass(frozen=True, slots=True)
class Keeper:
    """Who could keep copies: the instance, its zone ("": not told), and how many copies it keeps already."""

    instance: str
    zone: str
    load: int


def holder(own: str, zone: str, candidates: Sequence[Keeper], after: int = 0) -> int | None:
    """Index of the candidate that keeps the copies of an instance `own`; None if all are on that instance.

    One in another zone comes before all others, for zones fail as a whole; then the least loaded is taken, and
    among equals the next one in the ring, counted from `after`.
    """
    ring = [
        (not apart(zone, one.zone), one.load, (index - after) % len(candidates), index)
        for index, one in enumerate(candidates)
        if one.instance != own
    ]
    return min(ring)[-1] if ring else None
