"""The part of a model that one worker holds, and how it talks to the shards beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from data.layout import ParallelConfig, Position
from data.models import ModelSpec, TensorSpec, kv_head_range, tensors, unit_range


@dataclass(frozen=True, slots=True)
class Place:
    """Decoder layers `layers` (half-open) of shard `shard` of `shards`.

    The `first` stage embeds tokens, the `last` one computes logits.
    """

    layers: tuple[int, int]
    shard: int
    shards: int
    first: bool
    last: bool

    @classmethod
    def of(cls, spec: ModelSpec, config: ParallelConfig, position: Position) -> Place:
        """The place of a position in a parallel configuration."""
        return cls(
            layers=config.stage_layers(position.stage, spec.layers),
            shard=position.shard,
            shards=config.shards,
            first=position.stage == 0,
            last=position.stage == config.stages - 1,
        )

    def kv_heads(self, spec: ModelSpec) -> tuple[int, int]:
        """Half-open range of KV heads whose cache is kept here."""
        return kv_head_range(spec, self.shard, self.shards)

    def query_heads(self, spec: ModelSpec) -> tuple[int, int]:
        """Half-open range of query heads computed here."""
        start, stop = unit_range(spec, "head", self.shard, self.shards)
        return start // spec.head_dim, stop // spec.head_dim

    def holds(self, tensor: TensorSpec) -> bool:
        """Whether any part of a checkpoint tensor is held here."""
        if tensor.layer is not None:
            return self.layers[0] <= tensor.layer < self.layers[1]
        return (tensor.first and self.first) or (tensor.last and self.last)

    def boxes(self, spec: ModelSpec) -> Iterator[tuple[TensorSpec, tuple[int, ...], tuple[int, ...]]]:
        """Every tensor held here with the start and stop, per dimension, of the part that is held."""
        for tensor in tensors(spec):
            if self.holds(tensor):
                start, stop = [0] * len(tensor.shape), list(tensor.shape)
                if tensor.unit is not None:
                    start[tensor.dim], stop[tensor.dim] = unit_range(spec, tensor.unit, self.shard, self.shards)
                yield tensor, tuple(start), tuple(stop)


class Communicator(Protocol):
    """The shards of one stage. Every shard makes the same calls in the same order."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the shards, on every shard; may overwrite its argument."""
        ...

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """On rank 0 the shards' `[n, sizes[rank]]` side by side along the last dimension; None elsewhere."""
        ...


class Rehearsed:
    """A communicator that can be silenced: then nothing is exchanged, and results have the shape but not the values.

    Kernels of a group must not run beside those of another group, and a step can be tried out without them.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm, self.rank, self.size = comm, comm.rank, comm.size
        self._silent = False
        self._rest_s = 0.0

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """The block exchanges nothing."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    @contextmanager
    def resting(self, rest_s: float) -> Iterator[None]:
        """In every layer of the block its thread rests: another one of the process has tokens to deliver."""
        self._rest_s = rest_s
        try:
            yield
        finally:
            self._rest_s = 0.0

    def rest(self) -> None:
        """A moment for other threads, where this one should leave them some."""
        if self._rest_s:
            time.sleep(self._rest_s)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See `Communicator`."""
        self.rest()
        return tensor if self._silent else self._comm.all_reduce(tensor)

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """See `Communicator`."""
        if not self._silent:
            return self._comm.gather(tensor, sizes)
        return None if self.rank else tensor.new_zeros(*tensor.shape[:-1], sum(sizes))


class SoloCommunicator:
    """The communicator of a stage that is not sharded."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor | None:
        """The tensor itself."""
        return tensor
