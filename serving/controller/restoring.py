"""What is left of a request's KV after its replica broke: the best of it, and whether bringing it back pays."""

from __future__ import annotations

from collections.abc import Sequence

from data.models import ModelSpec
from planning.restoration import Rates, restorable_tokens, worth_restoring
from serving.controller.orders import Source
from serving.controller.records import Record
from serving.settings import Replication


def best_sources(spec: ModelSpec, record: Record, last: int, found: Sequence[Source]) -> tuple[Sequence[Source], int]:
    """What brings back the most of a request, and how many tokens that is; what replicas before its `last` one left
    only where it adds something.

    What others have under its key was on its way there and never arrived.
    """
    known = [source for source in found if source.replica in record.homes]
    own = [source for source in known if source.replica == last]
    return max(((some, _watermark(spec, record, some)) for some in (own, known)), key=lambda option: option[1])


def _watermark(spec: ModelSpec, record: Record, sources: Sequence[Source]) -> int:
    """How many tokens can be restored: never the last known one, whose logits are needed."""
    left = restorable_tokens(spec, [(source.box, source.tokens) for source in sources])
    return max(0, min(left, len(record.request.prompt) + len(record.output) - 1))


def pays(spec: ModelSpec, replication: Replication, tokens: int) -> bool:
    """Whether restoring so many tokens is quicker than computing them again."""
    rates = Rates(replication.link_bytes_per_s, replication.prefill_tokens_per_s)
    return worth_restoring(tokens * spec.kv_token_bytes, tokens, rates)
