"""A step plan as tensors: what every layer of a step needs, computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from serving.engine.batch import SequenceStep, StepPlan
from serving.engine.blocks import blocks_for

_MASK_ELEMENTS = 1 << 20  # query rows × context of one attention call


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Sequences of a step that attend together, `tokens` query rows each.

    `rows` `[sequences · tokens]` are their rows in the step, `blocks` `[sequences, table]` their
    padded block tables, `visible` `[sequences, tokens, context]` which positions each row may see.
    """

    rows: Tensor
    tokens: int
    blocks: Tensor
    visible: Tensor


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Per row of the step (sequences in plan order, each one's tokens in order): id, position, KV slot.

    `sampled` are the rows whose logits are wanted.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    sampled: Tensor
    groups: tuple[AttentionGroup, ...]

    @classmethod
    def of(cls, plan: StepPlan, *, block_tokens: int, window: int | None, device: torch.device) -> StepTensors:
        """The tensors of a plan; `window` is the width of sliding-window attention, if any."""
        rows: list[tuple[int, int, int]] = []
        sampled: list[int] = []
        pieces: list[_Piece] = []
        for sequence in plan.sequences:
            pieces.append(_Piece.of(sequence, len(rows), block_tokens))
            for position, token in enumerate(sequence.tokens, start=sequence.start):
                block, offset = divmod(position, block_tokens)
                rows.append((token, position, sequence.blocks[block] * block_tokens + offset))
            if sequence.sampling is not None:
                sampled.append(len(rows) - 1)
        tokens, positions, slots = torch.tensor(rows, dtype=torch.long, device=device).unbind(1)
        return cls(
            tokens,
            positions,
            slots.contiguous(),
            torch.tensor(sampled, dtype=torch.long, device=device),
            tuple(_attention_group(group, block_tokens, window, device) for group in _grouped(pieces, block_tokens)),
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive query rows of one sequence: first row of the step, first position, count, block table."""

    row: int
    start: int
    tokens: int
    blocks: list[int]

    @classmethod
    def of(cls, sequence: SequenceStep, row: int, block_tokens: int) -> _Piece:
        count = len(sequence.tokens)
        table = sequence.blocks[: blocks_for(sequence.start + count, block_tokens)]
        return cls(row, sequence.start, count, table)

    @property
    def bucket(self) -> int:
        """Decode rows whose block tables have the same power of two above them share an attention call."""
        return (len(self.blocks) - 1).bit_length()

    def split(self, block_tokens: int) -> Iterator[_Piece]:
        """Pieces whose mask stays within bounds."""
        most = max(1, _MASK_ELEMENTS // (len(self.blocks) * block_tokens))
        for offset in range(0, self.tokens, most):
            yield _Piece(self.row + offset, self.start + offset, min(most, self.tokens - offset), self.blocks)


def _grouped(pieces: Sequence[_Piece], block_tokens: int) -> Iterator[list[_Piece]]:
    """Decode rows by context bucket, prefill chunks one by one."""
    decodes = sorted((piece for piece in pieces if piece.tokens == 1), key=lambda piece: piece.bucket)
    for _, group in groupby(decodes, key=lambda piece: piece.bucket):
        yield list(group)
    for piece in pieces:
        if piece.tokens > 1:
            yield from ([part] for part in piece.split(block_tokens))


def _attention_group(
    pieces: Sequence[_Piece], block_tokens: int, window: int | None, device: torch.device
) -> AttentionGroup:
    count = pieces[0].tokens
    table = max(len(piece.blocks) for piece in pieces)
    rows = [row for piece in pieces for row in range(piece.row, piece.row + count)]
    blocks = [piece.blocks + [0] * (table - len(piece.blocks)) for piece in pieces]
    starts = torch.tensor([piece.start for piece in pieces], device=device)
    position = (starts[:, None] + torch.arange(count, device=device))[:, :, None]
    context = torch.arange(table * block_tokens, device=device)
    visible = context <= position
    if window is not None:
        visible &= context > position - window
    return AttentionGroup(
        rows=torch.tensor(rows, device=device),
        tokens=count,
        blocks=torch.tensor(blocks, device=device),
        visible=visible,
    )
