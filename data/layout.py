"""Parallel configurations, positions, and their binding to devices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data.errors import InvalidInput

_KEY = re.compile(r"D(\d+)·P(\d+)·T(\d+)·B(\d+)(?:·L(\d+(?:\+\d+)*))?")


@dataclass(frozen=True, slots=True, order=True)
class Device:
    """One accelerator, or on CPU one worker slot, of an instance."""

    instance: str
    index: int

    def __str__(self) -> str:
        return f"{self.instance}/{self.index}"


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a parallel configuration: which replica, which stage, which shard (0-based)."""

    replica: int
    stage: int
    shard: int


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """`replicas` copies of the model, each `stages` × `shards` devices, each running up to
    `max_batch` requests at once. `partition` gives the layers of every stage; empty means balanced
    (earlier stages take the remainder).
    """

    replicas: int
    stages: int
    shards: int
    max_batch: int
    partition: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.replicas, self.stages, self.shards, self.max_batch) < 1:
            raise InvalidInput(f"every degree of {self} must be at least 1")
        if self.partition and (len(self.partition) != self.stages or min(self.partition) < 1):
            raise InvalidInput(f"partition {self.partition} must give every one of {self.stages} stages a layer")

    def __str__(self) -> str:
        return f"D{self.replicas}·P{self.stages}·T{self.shards}·B{self.max_batch}"

    @property
    def key(self) -> str:
        """Text form that says everything, such as `D2·P3·T1·B8` or, with a partition, `D2·P3·T1·B8·L4+4+3`."""
        return f"{self}·L{'+'.join(map(str, self.partition))}" if self.partition else str(self)

    @classmethod
    def from_key(cls, key: str) -> ParallelConfig:
        """Inverse of `key`. Raises `InvalidInput`."""
        found = _KEY.fullmatch(key)
        if found is None:
            raise InvalidInput(f"{key!r} is not a parallel configuration; write one like D2·P3·T1·B8")
        *degrees, layers = found.groups()
        replicas, stages, shards, max_batch = map(int, degrees)
        return cls(replicas, stages, shards, max_batch, tuple(map(int, layers.split("+"))) if layers else ())

    @property
    def devices(self) -> int:
        """Devices the whole configuration takes."""
        return self.replicas * self.stages * self.shards

    @property
    def replica_devices(self) -> int:
        """Devices one replica takes."""
        return self.stages * self.shards

    @property
    def shape(self) -> tuple[int, int, tuple[int, ...]]:
        """What two replicas must share so that one can stand in for the other: (stages, shards, partition)."""
        return self.stages, self.shards, self.partition

    def stage_layers(self, stage: int, layers: int) -> tuple[int, int]:
        """Half-open range of decoder layers that `stage` computes in a model of `layers` layers."""
        if not 0 <= stage < self.stages <= layers:
            raise InvalidInput(f"stage {stage} of {self.stages} does not exist in a model of {layers} layers")
        if not self.partition:
            each, more = divmod(layers, self.stages)
            start = stage * each + min(stage, more)
            return start, start + each + (stage < more)
        if sum(self.partition) != layers:
            raise InvalidInput(f"partition {self.partition} does not add up to {layers} layers")
        return sum(self.partition[:stage]), sum(self.partition[: stage + 1])

    def positions(self) -> Iterator[Position]:
        """Every position, replica by replica, stage by stage, shard by shard."""
        for replica in range(self.replicas):
            for stage in range(self.stages):
                for shard in range(self.shards):
                    yield Position(replica, stage, shard)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_json` inverts it."""
        return {
            "replicas": self.replicas,
            "stages": self.stages,
            "shards": self.shards,
            "max_batch": self.max_batch,
            "partition": list(self.partition),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ParallelConfig:
        """Inverse of `to_json`."""
        try:
            fields = {**value, "partition": tuple(value.get("partition", ()))}
            return cls(**fields)
        except TypeError as error:
            raise InvalidInput(f"not a parallel configuration: {error}") from error


@dataclass(frozen=True, slots=True)
class Layout:
    """A parallel configuration with its positions bound to devices, in `config.positions()` order."""

    config: ParallelConfig
    devices: tuple[Device, ...]

    def __post_init__(self) -> None:
        if len(self.devices) != self.config.devices:
            raise InvalidInput(f"{self.config} needs {self.config.devices} devices, not {len(self.devices)}")
        if len(set(self.devices)) != len(self.devices):
            raise InvalidInput("a device cannot hold two positions of one layout")

    def bound(self) -> Iterator[tuple[Position, Device]]:
        """Pairs of position and device, in position order."""
        return zip(self.config.positions(), self.devices, strict=True)

    def replica_devices(self, replica: int) -> tuple[Device, ...]:
        """Devices of one replica in (stage, shard) order; the first is its leader."""
        size = self.config.replica_devices
        return self.devices[replica * size : (replica + 1) * size]
