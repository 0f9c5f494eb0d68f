"""What a worker needs to run its rank of a group: the groups it talks through, and its part of every model there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from data.models import ModelSpec
from serving.engine.batch import SampledToken, StepPlan
from serving.engine.kv_cache import KvCache
from serving.engine.kv_index import KvIndex
from serving.messages import Hosted, Role
from serving.worker.groups import Group, Hop


class StepModel(Protocol):
    """What a step loop asks of a model part; `ShardModel` is one."""

    spec: ModelSpec

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Dtype of the activations between stages."""

    def rows(self, plan: StepPlan) -> int:
        """Rows of the activations of a step."""

    def forward(self, plan: StepPlan, hidden: Tensor | None) -> Tensor | None:
        """The next stage's activations, or the logits."""

    def draw(self, logits: Tensor | None, plan: StepPlan) -> list[SampledToken]:
        """The tokens drawn from the logits."""

    def close(self) -> None:
        """No step is computed any more."""


def _open(plan: StepPlan) -> None:
    """The gate of a part whose steps wait for nothing."""


@dataclass(slots=True)
class ModelPart:
    """A replica on one worker: what computes, its KV, and what of it is there.

    `gate` is called before every step; it may hold the step up, for example until copies of the KV have caught up.
    """

    hosted: Hosted
    model: StepModel
    cache: KvCache
    index: KvIndex = field(default_factory=KvIndex)
    gate: Callable[[StepPlan], None] = _open


@dataclass(slots=True)
class Position:
    """A rank of a group. `parts` are in the order of the role's replicas, which plans count them by."""

    role: Role
    parts: tuple[ModelPart, ...]
    group: Group
    before: Hop | None = None  # to the same shard of the stage before
    after: Hop | None = None
    comm: Group | None = None  # of the stage's shards

    @property
    def number(self) -> int:
        """The first replica, which stands for all of the group."""
        return self.role.hosted[0].replica

    @property
    def replicas(self) -> list[int]:
        """All that share this position."""
        return [one.replica for one in self.role.hosted]

    def part(self, replica: int) -> ModelPart | None:
        """The part of a replica, if it is of this group."""
        return next((part for part in self.parts if part.hosted.replica == replica), None)

    @property
    def at_rest(self) -> bool:
        """Whether the device has been through every step of this rank; activations on their way do not count."""
        return all(part.index.at_rest for part in self.parts)

    def abort(self) -> None:
        """From any thread: make whatever this rank waits for fail. All groups: a kernel that waits in one of them
        would hold up everything that has to wait for the device, the end of the others included.
        """
        for group in self._groups():
            group.abort()

    def give_up(self) -> None:
        """From any thread: nothing that this rank computes from now on counts."""
        for group in self._groups():
            group.give_up()

    def close(self) -> None:
        """The loop has ended on every rank, and in peace: the groups may serve another position."""
        for group in self._groups():
            group.close()

    def _groups(self) -> list[Group]:
        hops = [hop.group for hop in (self.before, self.after) if hop is not None]
        return [group for group in dict.fromkeys([self.comm, self.group, *hops]) if group is not None]

    @property
    def tail(self) -> int:
        """The rank that samples."""
        return (self.role.stages - 1) * self.role.shards
