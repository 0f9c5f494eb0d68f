"""Instances, what they cost, and which of them are usable now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from data.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class InstanceType:
    """A kind of machine that comes and goes as one.

    Prices are US dollars per hour of the whole instance; bandwidths are bytes per second and per
    direction (`network` between instances, `local` between devices of one instance); `grace_s` is
    the warning the provider promises before taking a spot instance away.
    """

    name: str
    devices: int
    accelerator: str
    memory_bytes: int
    network_bytes_per_s: float
    local_bytes_per_s: float
    price_on_demand_usd_h: float
    price_spot_usd_h: float
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        if self.devices < 1 or self.memory_bytes < 1:
            raise InvalidInput(f"instance type {self.name} needs at least one device with memory")


@dataclass(frozen=True, slots=True)
class ClusterState:
    """How many instances of each type are usable: sorted `(type name, count)` pairs, no zeros."""

    counts: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> ClusterState:
        """Normalise a mapping from type name to count. Raises `InvalidInput` on negative counts."""
        if any(count < 0 for count in counts.values()):
            raise InvalidInput(f"a cluster state cannot hold negative counts: {dict(counts)}")
        return cls(tuple(sorted((name, count) for name, count in counts.items() if count)))

    @property
    def key(self) -> str:
        """Stable text form, such as `local-cpu=3`; the empty cluster is `empty`."""
        return ",".join(f"{name}={count}" for name, count in self.counts) or "empty"

    @classmethod
    def from_key(cls, key: str) -> ClusterState:
        """Inverse of `key`."""
        if key == "empty":
            return cls(())
        try:
            return cls.of({name: int(count) for name, count in (part.split("=") for part in key.split(","))})
        except ValueError as error:
            raise InvalidInput(f"{key!r} is not a cluster state; write type=count,type=count") from error

    @property
    def instances(self) -> int:
        """Number of usable instances over all types."""
        return sum(count for _, count in self.counts)

    def contains(self, part: ClusterState) -> bool:
        """Whether `part` is left of this state when some instances go, or none."""
        counts = dict(self.counts)
        return all(count <= counts.get(name, 0) for name, count in part.counts)


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """The fleet that plans are made for: the types, and at most how many of each."""

    name: str
    types: tuple[InstanceType, ...]
    most: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.types) != len(self.most) or len({kind.name for kind in self.types}) != len(self.types):
            raise InvalidInput(f"cluster {self.name} needs one maximum for each of its distinct types")

    def states(self) -> tuple[ClusterState, ...]:
        """Every reachable state, from the empty cluster to the full one."""
        names = [kind.name for kind in self.types]
        ranges = [range(count + 1) for count in self.most]
        return tuple(ClusterState.of(dict(zip(names, counts, strict=True))) for counts in product(*ranges))

    def devices(self, state: ClusterState) -> int:
        """Number of devices in a state. Raises `InvalidInput` for a type the fleet does not have."""
        sizes = {kind.name: kind.devices for kind in self.types}
        unknown = [name for name, _ in state.counts if name not in sizes]
        if unknown:
            raise InvalidInput(f"cluster {self.name} has no instance type {unknown[0]}; it has {', '.join(sizes)}")
        return sum(sizes[name] * count for name, count in state.counts)

    def price_usd_h(self, state: ClusterState, devices: int | None = None) -> float:
        """Spot dollars per hour of the instances of a state, or of the cheapest of them that have so many `devices`."""
        counts, price_usd_h = dict(state.counts), 0.0
        left = self.devices(state) if devices is None else devices
        for kind in sorted(self.types, key=lambda kind: kind.price_spot_usd_h / kind.devices):
            taken = min(counts.get(kind.name, 0), -(-max(left, 0) // kind.devices))
            price_usd_h, left = price_usd_h + taken * kind.price_spot_usd_h, left - taken * kind.devices
        return price_usd_h

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_json` inverts it."""
        types = [{field: getattr(kind, field) for field in kind.__dataclass_fields__} for kind in self.types]
        return {"name": self.name, "types": types, "most": list(self.most)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ClusterSpec:
        """Inverse of `to_json`."""
        try:
            types = tuple(InstanceType(**kind) for kind in value["types"])
            return cls(str(value["name"]), types, tuple(value["most"]))
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"not a cluster spec: {error}") from error
