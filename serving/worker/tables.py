"""Plans on their way to the other ranks of a replica. Of block tables only what these do not know is said: whole tables
would be most of a plan, and several times as slow to read as the rest of it.
"""

from __future__ import annotations

import msgspec

from serving.engine.batch import SequenceStep, StepPlan
from serving.worker.groups import GroupBroken

_encode = msgspec.msgpack.Encoder().encode


class _Message(msgspec.Struct, frozen=True, array_like=True):
    """A plan without the first `known` blocks of each of its sequences."""

    plan: StepPlan
    known: list[int]


_decoder = msgspec.msgpack.Decoder(_Message)


class Sent:
    """The leader's side: how much of each table the others have. They hear every plan, in order.

    A table only grows until a plan says that its sequence has ended, or until it is forgotten.
    """

    def __init__(self) -> None:
        self._lengths: dict[tuple[int, int], int] = {}

    def forget(self, part: int, key: int) -> None:
        """A sequence has another table now."""
        self._lengths.pop((part, key), None)

    def encode(self, plan: StepPlan) -> bytes:
        """What `Known.decode` makes `plan` of."""
        for key in plan.ended:
            self.forget(plan.part, key)
        known = [self._lengths.get((plan.part, one.key), 0) for one in plan.sequences]
        rest = [one.blocks[count:] for one, count in zip(plan.sequences, known, strict=True)]
        self._lengths |= {(plan.part, one.key): len(one.blocks) for one in plan.sequences}
        return _encode(_Message(_with_blocks(plan, rest), known))


class Known:
    """The side of another rank."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, int], list[int]] = {}

    def decode(self, payload: bytes) -> StepPlan:
        """The plan; a table that has not changed is the same object as before."""
        message = _decoder.decode(payload)
        plan = message.plan
        for key in plan.ended:
            self._tables.pop((plan.part, key), None)
        pairs = zip(plan.sequences, message.known, strict=True)
        return _with_blocks(plan, [self._table(plan.part, one, known) for one, known in pairs])

    def _table(self, part: int, one: SequenceStep, known: int) -> list[int]:
        table = self._tables.get((part, one.key), [])
        if len(table) < known:
            raise GroupBroken(f"{known} blocks of sequence {one.key} should be known here, and {len(table)} are")
        if one.blocks or len(table) > known:
            table = self._tables[part, one.key] = [*table[:known], *one.blocks]
        return table


def _with_blocks(plan: StepPlan, tables: list[list[int]]) -> StepPlan:
    steps = [
        SequenceStep(one.key, one.start, one.tokens, blocks, one.sampling, one.output_index)
        for one, blocks in zip(plan.sequences, tables, strict=True)
    ]
    return StepPlan(plan.step, steps, plan.ended, plan.part)
