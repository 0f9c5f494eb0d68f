"""SpotServe's device-mapping objective: what a device already holds of a position, as published.

X. Miao et al., "SpotServe: Serving Generative Large Language Models on Preemptible Instances",
ASPLOS'24, §3.3, in the form of its artifact: GPT layers of 12h² + 7h elements and 6h replicated
ones, K counted once. Our own mapping counts the bytes of real boxes (`planning.mapping`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.layout import ParallelConfig, Position
from planning.matching import Matrix


@dataclass(frozen=True, slots=True)
class GptShape:
    """The four dimensions that the published weights depend on; `layers` are the stored ones."""

    layers: int
    vocab: int
    hidden: int
    max_seq: int


@dataclass(frozen=True, slots=True)
class InterruptedBatches:
    """`batch[k]` requests of `tokens` tokens live on old replica k (None: none); new replica d goes on
    with old replica `inherits[d]`, where that exists.
    """

    batch: Sequence[int | None]
    tokens: int
    inherits: Sequence[int]

    def continued(self, new_replica: int, old_replica: int) -> int:
        """Requests of the old replica that the new one goes on with."""
        if self.inherits[new_replica] != old_replica or old_replica >= len(self.batch):
            return 0
        return self.batch[old_replica] or 0


def weight_unit(model: GptShape, old: ParallelConfig, new: ParallelConfig) -> int:
    """What `edge_weights` are multiples of: divide by it for the published unit (elements / hidden size)."""
    return model.hidden * old.shards * new.shards


def edge_weights(
    model: GptShape,
    old: ParallelConfig,
    new: ParallelConfig,
    held: Sequence[Position | None],
    batches: InterruptedBatches,
) -> Matrix:
    """Weight of every (device, new position) edge in exact integers, see `weight_unit`.

    `held` are the old positions of the devices; a device without one weighs nothing anywhere.
    """
    targets = list(new.positions())
    rows = [[_edge(model, old, new, have, want, batches) if have else 0 for want in targets] for have in held]
    return np.array(rows, dtype=np.int64).reshape(len(held), len(targets))


def _edge(
    model: GptShape,
    old: ParallelConfig,
    new: ParallelConfig,
    have: Position,
    want: Position,
    batches: InterruptedBatches,
) -> int:
    hidden, cut = model.hidden, old.shards * new.shards
    batch = batches.continued(want.replica, have.replica)
    kv = batches.tokens
    layers = _common(old.stage_layers(have.stage, model.layers), new.stage_layers(want.stage, model.layers))
    ours = have.shard * new.shards, (have.shard + 1) * new.shards
    theirs = want.shard * old.shards, (want.shard + 1) * old.shards
    shard = _common(ours, theirs)
    weight = layers * (6 * cut + shard * (12 * hidden + 7 + batch * kv)) * hidden
    weight += (model.vocab + model.max_seq) * hidden * cut
    if have.stage == old.stages - 1 and want.stage == new.stages - 1:
        weight += (model.vocab + 2) * hidden * cut
    return weight + (kv + 3 * hidden + 4) * batch * cut


def _common(one: tuple[int, int], other: tuple[int, int]) -> int:
    return max(min(one[1], other[1]) - max(one[0], other[0]), 0)
