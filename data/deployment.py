"""What runs on a fleet: groups of devices, each with one or more models that share it.

A *group* is `stages × shards` devices; every model that it *hosts* has one replica there. Replicas of a group take
turns step by step and divide its KV memory. A fleet of one model has groups that host just that one, under the
name "".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.canonical import exactly
from data.errors import InvalidInput
from data.layout import ParallelConfig
from data.placement import Shape


@dataclass(frozen=True, slots=True, order=True)
class Hosted:
    """A model of a group: up to `max_batch` requests at once, `kv_share` (0 to 1) of the group's KV memory.

    `partition` gives the layers of every stage; empty means balanced.
    """

    model: str
    max_batch: int
    kv_share: float = 1.0
    partition: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.kv_share <= 1:
            raise InvalidInput(f"the KV share of {self.model!r} must be above 0 and at most 1, not {self.kv_share}")


@dataclass(frozen=True, slots=True, order=True)
class SharedGroup:
    """`stages × shards` devices and the models that share them, each once, in order of their names."""

    stages: int
    shards: int
    hosted: tuple[Hosted, ...]

    def __post_init__(self) -> None:
        if not self.hosted:
            raise InvalidInput("a group hosts at least one model; leave the group out if it is to host none")
        object.__setattr__(self, "hosted", tuple(sorted(self.hosted)))
        twice = [model for model, count in Counter(self.models).items() if count > 1]
        if twice:
            raise InvalidInput(f"a group hosts a model once; {twice[0]!r} is there twice, use several groups")
        if sum(one.kv_share for one in self.hosted) > 1 + 1e-9:
            raise InvalidInput(f"the KV shares of {', '.join(map(repr, self.models))} add up to more than 1")
        for one in self.hosted:
            self.config(one)  # which checks the degrees

    def __str__(self) -> str:
        names = ", ".join(f"{one.model}·B{one.max_batch}" for one in self.hosted)
        return f"P{self.stages}·T{self.shards}({names})"

    @property
    def devices(self) -> int:
        """Devices of the group."""
        return self.stages * self.shards

    @property
    def shape(self) -> Shape:
        """Its degrees, as a placement has them."""
        return Shape(self.shards, self.stages)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models it hosts."""
        return tuple(one.model for one in self.hosted)

    def config(self, hosted: Hosted) -> ParallelConfig:
        """How one of its models runs there."""
        return ParallelConfig(1, self.stages, self.shards, hosted.max_batch, hosted.partition)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_json` inverts it."""
        models = [
            {"model": one.model, "max_batch": one.max_batch, "kv_share": one.kv_share, "partition": list(one.partition)}
            for one in self.hosted
        ]
        return {"stages": self.stages, "shards": self.shards, "models": models}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SharedGroup:
        """Inverse of `to_json`. Raises `InvalidInput`, `TypeError` or `KeyError` for anything else."""
        fields = exactly(value, ("stages", "shards", "models"), "a group")
        hosted = [exactly(one, Hosted.__dataclass_fields__, "a hosted model") for one in fields["models"]]
        read = (Hosted(**{**one, "partition": tuple(one["partition"])}) for one in hosted)
        return cls(int(fields["stages"]), int(fields["shards"]), tuple(read))


@dataclass(frozen=True, slots=True)
class Deployment:
    """All groups that run at once, equal ones next to each other."""

    groups: tuple[SharedGroup, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise InvalidInput("a deployment has at least one group")
        object.__setattr__(self, "groups", tuple(sorted(self.groups)))

    @classmethod
    def of(cls, config: ParallelConfig) -> Deployment:
        """A fleet of one model: a group for every replica of `config`."""
        hosted = Hosted("", config.max_batch, 1.0, config.partition)
        return cls((SharedGroup(config.stages, config.shards, (hosted,)),) * config.replicas)

    def __str__(self) -> str:
        if (config := self.uniform) is not None:
            return str(config)
        return " + ".join(f"{count}×{group}" if count > 1 else str(group) for group, count in self.counts.items())

    @property
    def devices(self) -> int:
        """Devices of all groups."""
        return sum(group.devices for group in self.groups)

    @property
    def counts(self) -> Counter[SharedGroup]:
        """How many groups of each kind there are, in order."""
        return Counter(self.groups)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models that some group hosts."""
        return tuple(sorted({model for group in self.groups for model in group.models}))

    def batch(self, model: str) -> int:
        """How many requests of a model run at once."""
        return sum(one.max_batch for group in self.groups for one in group.hosted if one.model == model)

    @property
    def uniform(self) -> ParallelConfig | None:
        """The configuration of a fleet of one model in equal groups; None for any other."""
        first = self.groups[0]
        if first.models != ("",) or len(self.counts) > 1:
            return None
        (hosted,) = first.hosted
        return ParallelConfig(len(self.groups), first.stages, first.shards, hosted.max_batch, hosted.partition)


def tensor_name(model: str, tensor: str) -> str:
    """What a model's checkpoint tensor is called among those of all models; that of the only model as in its files."""
    return f"{model}/{tensor}" if model else tensor


def split_name(name: str) -> tuple[str, str]:
    """Inverse of `tensor_name`: the model and the tensor's name in its checkpoint."""
    model, _, tensor = name.rpartition("/")
    return model, tensor
