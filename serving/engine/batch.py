"""What one step computes: a plan that the leader makes and every position of the replica executes."""

from __future__ import annotations

import msgspec

from serving.requests import Sampling, TopLogprob


class SequenceStep(msgspec.Struct, frozen=True, array_like=True):
    """The part of one sequence that a step computes.

    `tokens` are the ids at positions `start` … `start + len(tokens) - 1`; `blocks` is the sequence's
    block table, long enough for them. `sampling` is set when the logits of the last token are wanted;
    the token drawn then has output position `output_index`.
    """

    key: int
    start: int
    tokens: list[int]
    blocks: list[int]
    sampling: Sampling | None
    output_index: int


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step of one replica; `step` counts up within an epoch. `ended` are sequences that gave their KV up.

    `part` says of which model it is, where several share the devices.
    """

    step: int
    sequences: list[SequenceStep]
    ended: list[int] = []
    part: int = 0


class SampledToken(msgspec.Struct, frozen=True, array_like=True):
    """The token drawn for sequence `key`, its log-probability, and the alternatives asked for."""

    key: int
    token: int
    logprob: float
    top: list[TopLogprob]
