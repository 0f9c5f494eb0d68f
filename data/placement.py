"""Many models on one fleet: what is hosted, what it is hosted on, who sits with whom, and what arrives.

Vocabulary: a *group* is `shards × stages` devices that run one shape; all models of a group share its devices.
A *placement* is a tuple of groups. The order of groups matters, because it breaks ties of dispatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import InvalidInput


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """Tensor parallelism (`shards`, op in AlpaServe's files) × pipeline parallelism (`stages`, pp there)."""

    shards: int
    stages: int

    def __post_init__(self) -> None:
        if min(self.shards, self.stages) < 1:
            raise InvalidInput(f"a group of {self.shards} × {self.stages} devices cannot be; use degrees of 1 or more")

    def __str__(self) -> str:
        return f"({self.shards},{self.stages})"

    @property
    def devices(self) -> int:
        """Devices of one group of this shape."""
        return self.shards * self.stages


@dataclass(frozen=True, slots=True)
class StageProfile:
    """Seconds that one request takes in every stage, and the bytes of weights on each device of every stage.

    A batch is a line of its own: of B requests at once each takes B equal stages, one after the other, so that a
    request takes its time and every stage's time another may begin (see `planning.hosting`).
    """

    latency_s: tuple[float, ...]
    weight_bytes: tuple[float, ...]

    @property
    def widest_bytes(self) -> float:
        """Weights of the largest stage."""
        return max(self.weight_bytes)


@dataclass(frozen=True, slots=True)
class HostedModel:
    """A model to serve: `kind` names its profile, `slo_s` bounds arrival to response; `cv` is that of the gaps."""

    name: str
    kind: str
    slo_s: float
    rate_rps: float
    cv: float


@dataclass(frozen=True, slots=True)
class SharedFleet:
    """Equal devices with `budget_bytes` for weights each, and models with the profiles of their kinds.

    Groups of more than `devices_per_node` devices fill whole nodes.
    """

    devices: int
    budget_bytes: float
    devices_per_node: int
    models: tuple[HostedModel, ...]
    profiles: Mapping[str, Mapping[Shape, StageProfile]]

    def __post_init__(self) -> None:
        if min(self.devices, self.devices_per_node) < 1 or not self.models:
            raise InvalidInput("a shared fleet needs at least one device and one model")
        unknown = sorted({model.kind for model in self.models} - set(self.profiles))
        if unknown:
            raise InvalidInput(f"no profile for {', '.join(unknown)}; profile every kind of model that is to be hosted")

    def profile(self, model: int, shape: Shape) -> StageProfile | None:
        """How `models[model]` runs in this shape; None if it was not profiled so."""
        return self.profiles[self.models[model].kind].get(shape)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Every shape that some model was profiled in, in order."""
        return tuple(sorted({shape for kind in self.profiles.values() for shape in kind}))

    def whole_nodes(self, shape: Shape) -> bool:
        """Whether a group of this shape lies in one node or fills nodes."""
        return shape.devices <= self.devices_per_node or shape.devices % self.devices_per_node == 0


@dataclass(frozen=True, slots=True)
class Group:
    """Models (indices into `SharedFleet.models`) that share the devices of one shape."""

    shape: Shape
    models: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """`{op, pp, models}`, as AlpaServe's tools write it."""
        return {"op": self.shape.shards, "pp": self.shape.stages, "models": list(self.models)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Group:
        """Inverse of `to_json`. Raises `InvalidInput` for data parallelism inside a group."""
        if value.get("dp", 1) != 1:
            raise InvalidInput("a group is one replica of each of its models (dp 1); write several groups instead")
        return cls(Shape(int(value["op"]), int(value["pp"])), tuple(int(model) for model in value["models"]))


@dataclass(frozen=True, slots=True)
class Placement:
    """Groups; a model may be in several of them, or in none (its requests are then rejected)."""

    groups: tuple[Group, ...]

    @property
    def devices(self) -> int:
        """Devices that the groups take together."""
        return sum(group.shape.devices for group in self.groups)

    @property
    def replicas(self) -> int:
        """Copies of models over all groups."""
        return sum(len(group.models) for group in self.groups)

    def normalised(self) -> Placement:
        """Groups in order of their sorted models; shapes move along, equal model lists keep their order."""
        ordered = (replace(group, models=tuple(sorted(group.models))) for group in self.groups)
        return Placement(tuple(sorted(ordered, key=lambda group: group.models)))

    def to_json(self) -> dict[str, Any]:
        """`{groups: [{op, pp, models}]}`."""
        return {"groups": [group.to_json() for group in self.groups]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Placement:
        """Inverse of `to_json`."""
        return cls(tuple(Group.from_json(group) for group in value["groups"]))


@dataclass(frozen=True, slots=True)
class Schedule:
    """Placements one after the other: number p serves arrivals up to and including `starts_s[p + 1]`."""

    starts_s: tuple[float, ...]
    placements: tuple[Placement, ...]

    def __post_init__(self) -> None:
        if len(self.starts_s) != len(self.placements) or not self.placements:
            raise InvalidInput("a schedule needs one start time for every placement, and at least one placement")
        if any(later < earlier for earlier, later in pairwise(self.starts_s)):
            raise InvalidInput("the start times of a schedule must be in order")

    @classmethod
    def always(cls, placement: Placement) -> Schedule:
        """The schedule that never changes."""
        return cls((0.0,), (placement,))

    def to_json(self) -> dict[str, Any]:
        """`{start_times, segments: [{groups}]}`."""
        return {"start_times": list(self.starts_s), "segments": [one.to_json() for one in self.placements]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Schedule:
        """Inverse of `to_json`; also reads the JSON of a `Placement`."""
        if "segments" not in value:
            return cls.always(Placement.from_json(value))
        return cls(tuple(value["start_times"]), tuple(Placement.from_json(segment) for segment in value["segments"]))


@dataclass(frozen=True)
class Arrivals:
    """Requests in order of arrival: `times_s` float64 seconds, `models` the index of the model each one asks for."""

    times_s: npt.NDArray[np.float64]
    models: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        if self.times_s.ndim != 1 or self.times_s.shape != self.models.shape:
            raise InvalidInput("arrivals need one model for every arrival time")
        if np.any(np.diff(self.times_s) < 0):
            raise InvalidInput("arrival times must be in order")

    @classmethod
    def of(cls, times_s: npt.ArrayLike, models: npt.ArrayLike) -> Arrivals:
        """Arrivals from any numbers."""
        return cls(np.ascontiguousarray(times_s, np.float64), np.ascontiguousarray(models, np.int32))

    def __len__(self) -> int:
        return len(self.times_s)

    @cached_property
    def span_s(self) -> float:
        """Seconds from the first to the last arrival."""
        return float(self.times_s[-1] - self.times_s[0]) if len(self) > 1 else 0.0

    def counts(self, models: int) -> npt.NDArray[np.int64]:
        """Requests per model."""
        return np.bincount(self.models, minlength=models).astype(np.int64)

    def part(self, begin: int, end: int) -> Arrivals:
        """Requests number `begin` to `end` (not included)."""
        return Arrivals(self.times_s[begin:end], self.models[begin:end])

    def trimmed(self, seconds: float) -> tuple[int, int]:
        """The range of requests left after dropping int(seconds / span × requests) at each end."""
        skip = int(seconds / self.span_s * len(self)) if self.span_s > 0 else 0
        return skip, max(skip, len(self) - skip)
