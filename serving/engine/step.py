"""A step plan as tensors: what every layer of a step needs, computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.engine.batch import SequenceStep, StepPlan
from serving.engine.blocks import blocks_for

_MASK_ELEMENTS = 1 << 20  # query rows × context of one attention call
SHORT_TOKENS = 4  # of a sequence in a step: what has to be computed again after a loss, many sequences at once


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Sequences of a step that attend together, `tokens` query rows each.

    `rows` `[sequences · tokens]` are their rows in the step, `blocks` `[sequences, table]` their
    padded block tables, `visible` `[sequences, tokens, context]` which positions each row may see. Without
    `visible` the rows of the one sequence are the last of its first `context` tokens and see all before them.
    """

    rows: Tensor
    tokens: int
    blocks: Tensor
    context: int
    visible: Tensor | None


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows that each see a sequence up to their own token, and read its context in place.

    `rows` `[n]` are their rows in the step (None: all, in order), `tables` int32 `[n, table]` padded block
    tables, `lengths` int32 `[n]` how many tokens each may see, itself included.
    """

    rows: Tensor | None
    tables: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class StepTensors:
    """Per row of the step (sequences in plan order, each one's tokens in order): id, position, KV slot.

    `sampled` are the rows whose logits are wanted. Every row is in one of `groups` or in `decode`.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    sampled: Tensor
    groups: tuple[AttentionGroup, ...]
    decode: DecodeRows | None = None

    @classmethod
    def of(
        cls, plan: StepPlan, *, block_tokens: int, window: int | None, device: torch.device, paged: bool = False
    ) -> StepTensors:
        """The tensors of a plan; `window` is the width of sliding-window attention, if any.

        `paged` makes `decode` of the rows that come alone or nearly so, and spares longer chunks the mask where they
        need none.
        """
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
        kind = np.int32 if paged else np.int64  # what recorded steps have: kernels are compiled once
        tokens, positions, slots = (on_device(np.array(column, kind), device) for column in zip(*rows, strict=True))
        grouping = _Grouping(block_tokens, window, device, paged)
        return cls(
            tokens,
            positions,
            slots,
            on_device(np.array(sampled, np.int64), device),
            tuple(grouping.groups(pieces)),
            grouping.decode(pieces) if paged else None,
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


@dataclass(frozen=True, slots=True)
class _Grouping:
    """How the pieces of a step attend."""

    block_tokens: int
    window: int | None
    device: torch.device
    paged: bool

    def decode(self, pieces: Sequence[_Piece]) -> DecodeRows | None:
        """The rows of short pieces: keys and values of all of a step are there before anyone attends."""
        short = [piece for piece in pieces if piece.tokens <= SHORT_TOKENS]
        if not short:
            return None
        found = [(piece.row + at, piece.start + at + 1, piece.blocks) for piece in short for at in range(piece.tokens)]
        tables = np.zeros((len(found), max(len(piece.blocks) for piece in short)), np.int32)
        for row, (_, _, blocks) in enumerate(found):
            tables[row, : len(blocks)] = blocks
        lengths = np.array([length for _, length, _ in found], np.int32)
        rows = None
        if len(short) < len(pieces):
            rows = on_device(np.array([row for row, _, _ in found]), self.device)
        return DecodeRows(rows, on_device(tables, self.device), on_device(lengths, self.device))

    def groups(self, pieces: Sequence[_Piece]) -> Iterator[AttentionGroup]:
        """Single rows by context bucket (unless paged), prefill chunks one by one."""
        decodes = sorted((piece for piece in pieces if piece.tokens == 1), key=lambda piece: piece.bucket)
        for _, group in groupby([] if self.paged else decodes, key=lambda piece: piece.bucket):
            yield self._masked(list(group))
        for piece in pieces:
            if piece.tokens <= (SHORT_TOKENS if self.paged else 1):
                continue
            if self._unmasked(piece):
                yield self._group([piece], None)
            else:
                yield from (self._masked([part]) for part in piece.split(self.block_tokens))

    def _unmasked(self, piece: _Piece) -> bool:
        return self.paged and (self.window is None or piece.start + piece.tokens <= self.window)

    def _masked(self, pieces: list[_Piece]) -> AttentionGroup:
        starts = on_device(np.array([piece.start for piece in pieces]), self.device)
        position = (starts[:, None] + torch.arange(pieces[0].tokens, device=self.device))[:, :, None]
        context = torch.arange(_table(pieces) * self.block_tokens, device=self.device)
        visible = context <= position
        if self.window is not None:
            visible &= context > position - self.window
        return self._group(pieces, visible)

    def _group(self, pieces: list[_Piece], visible: Tensor | None) -> AttentionGroup:
        count, table = pieces[0].tokens, _table(pieces)
        rows = [row for piece in pieces for row in range(piece.row, piece.row + count)]
        blocks = [piece.blocks + [0] * (table - len(piece.blocks)) for piece in pieces]
        return AttentionGroup(
            rows=on_device(np.array(rows), self.device),
            tokens=count,
            blocks=on_device(np.array(blocks), self.device),
            context=max(piece.start for piece in pieces) + count,
            visible=visible,
        )


def _table(pieces: Sequence[_Piece]) -> int:
    return max(len(piece.blocks) for piece in pieces)


def on_device(host: NDArray[np.signedinteger[Any]], device: torch.device) -> Tensor:
    """A copy that keeps nobody waiting: a device that hangs must not stop whoever feeds it."""
    tensor = torch.from_numpy(host)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
