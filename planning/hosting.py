"""How a model runs in a group, for the search of placements; and placements as deployments, and back.

A replica runs up to B requests at once and finishes B of them in the time L that one takes in a full batch. In the
simulations of placements it is a line of B stages that take L / B each: a request takes L, and every L / B another one
may begin. That is the capacity of continuous batching, at the latency of a full batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from data.cluster import InstanceType
from data.demand import Demand
from data.deployment import Deployment, Hosted, SharedGroup
from data.layout import ParallelConfig, Position
from data.placement import Group, HostedModel, Placement, Shape, SharedFleet, StageProfile
from data.shared_plan import Speed
from planning.costs import CostModel
from planning.resharding import kv_extent
from planning.uneven import quickest_partition

_MOST_STAGES = 16  # the more, the longer the search, and a pipeline this deep waits for links


@dataclass(frozen=True)
class Tenant:
    """A model with its costs (without a reserve) and what is asked of it.

    `most_batch` bounds the requests of a replica, `tokens` is what KV space is sized for per request (None: the mean).
    """

    demand: Demand
    costs: CostModel
    most_batch: int = 8
    tokens: int | None = None
    _known: dict[tuple[Shape, int], Serving | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.demand.model

    def serving(self, shape: Shape, memory_bytes: int) -> Serving | None:
        """How the model runs in a group of this shape; None if it cannot, or fits with no batch.

        Of the batches B (powers of two) that fit, that with most B/L - B/SLO: a larger one finishes more requests, but
        leaves them less of the SLO for waiting. If none keeps the SLO, the quickest.
        """
        key = shape, memory_bytes
        if key not in self._known:
            self._known[key] = self._serving(shape, memory_bytes)
        return self._known[key]

    def _serving(self, shape: Shape, memory_bytes: int) -> Serving | None:
        spec = self.costs.spec
        if shape.shards > min(spec.heads, self.costs.most_shards) or shape.stages > spec.layers:
            return None
        sizes = (1 << power for power in range(self.most_batch.bit_length()))
        context = self.input_tokens + self.output_tokens // 2
        partition = quickest_partition(self.costs, shape, self.most_batch, context)
        every = [self._with_batch(ParallelConfig(1, shape.stages, shape.shards, size, partition)) for size in sizes]
        fitting = [one for one in every if one.memory_bytes <= memory_bytes]
        slo_s = self.demand.slo_s
        if any(one.latency_s <= slo_s for one in fitting):
            return max(fitting, key=lambda one: one.config.max_batch * (1 / one.latency_s - 1 / slo_s))
        return min(fitting, key=lambda one: one.latency_s, default=None)

    def _with_batch(self, config: ParallelConfig) -> Serving:
        inputs, outputs = self.input_tokens, self.output_tokens
        tokens = self.tokens or inputs + outputs
        return Serving(
            config,
            self.costs.request_latency_s(config, config.max_batch, inputs, outputs),
            self.costs.memory_bytes(config, tokens),
            _kv_bytes(self.costs, config, tokens),
            Speed(
                self.name,
                config.stages,
                config.shards,
                self.costs.prefill_s(config, inputs)[0] / inputs,
                self.costs.decode_s(config, config.max_batch, inputs + outputs // 2),
            ),
        )

    @property
    def input_tokens(self) -> int:
        """Mean prompt, in whole tokens."""
        return max(1, round(self.demand.input_tokens))

    @property
    def output_tokens(self) -> int:
        """Mean output, in whole tokens."""
        return max(1, round(self.demand.output_tokens))


@dataclass(frozen=True, slots=True)
class Serving:
    """One replica of a model: its configuration, the latency of a request in a full batch, memory of the fullest
    device, the KV of a full batch there, and its speed.
    """

    config: ParallelConfig
    latency_s: float
    memory_bytes: int
    kv_bytes: int
    speed: Speed

    @property
    def profile(self) -> StageProfile:
        """The batch as a line of equal stages; everything that a device needs counts as weights."""
        batch = self.config.max_batch
        return StageProfile((self.latency_s / batch,) * batch, (float(self.memory_bytes),) * self.config.stages)


def shared_fleet(
    tenants: Sequence[Tenant], kind: InstanceType, devices: int, *, reserve_bytes: int = 0
) -> SharedFleet:  # fmt: skip
    """What a placement on `devices` devices of instances of one type is searched in: every shape that they can form."""
    budget_bytes = kind.memory_bytes - reserve_bytes
    return SharedFleet(
        devices,
        float(budget_bytes),
        kind.devices,
        tuple(HostedModel(one.name, one.name, one.demand.slo_s, one.demand.rate_rps, one.demand.cv) for one in tenants),
        {one.name: _profiles(one, _shapes(devices, kind.devices), budget_bytes) for one in tenants},
    )


def deployment_of(placement: Placement, tenants: Sequence[Tenant], memory_bytes: int) -> Deployment | None:
    """The groups as the serving tier runs them; None without any. KV is shared out by what full batches need."""
    groups = tuple(_group(group, tenants, memory_bytes) for group in placement.groups if group.models)
    return Deployment(groups) if groups else None


def placement_of(deployment: Deployment | None, names: Sequence[str]) -> Placement:
    """The groups as a search sees them. Models that are not among `names` are left out."""
    numbers = {name: number for number, name in enumerate(names)}
    groups = deployment.groups if deployment is not None else ()
    held = (Group(one.shape, tuple(numbers[name] for name in one.models if name in numbers)) for one in groups)
    return Placement(tuple(group for group in held if group.models))


def speeds_of(deployments: Sequence[Deployment | None], tenants: Sequence[Tenant], memory_bytes: int) -> list[Speed]:
    """The speed of every model in every shape that it is hosted in, in order."""
    by_name = {one.name: one for one in tenants}
    used = {
        (name, group.shape)
        for deployment in deployments
        if deployment is not None
        for group in deployment.groups
        for name in group.models
    }
    return sorted(
        serving.speed for name, shape in used if (serving := by_name[name].serving(shape, memory_bytes)) is not None
    )


def _shapes(devices: int, devices_per_node: int) -> list[Shape]:
    degrees = [1 << power for power in range(devices.bit_length())]
    most = (min(devices // shards, _MOST_STAGES) for shards in degrees)
    found = (Shape(shards, stages) for shards, last in zip(degrees, most, strict=True) for stages in range(1, last + 1))
    return [one for one in found if one.devices <= devices_per_node or one.devices % devices_per_node == 0]


def _profiles(tenant: Tenant, shapes: Sequence[Shape], memory_bytes: int) -> Mapping[Shape, StageProfile]:
    """Shapes that do not fit are left in with what they would need, so that it can be said why nothing fits."""
    found: dict[Shape, StageProfile] = {}
    for shape in shapes:
        serving = tenant.serving(shape, memory_bytes) or replace(tenant, most_batch=1).serving(shape, 1 << 62)
        if serving is not None:
            found[shape] = serving.profile
    return found


def _group(group: Group, tenants: Sequence[Tenant], memory_bytes: int) -> SharedGroup:
    hosted = [(tenants[number].name, tenants[number].serving(group.shape, memory_bytes)) for number in group.models]
    need = {name: serving.kv_bytes for name, serving in hosted if serving is not None}
    return SharedGroup(
        group.shape.stages,
        group.shape.shards,
        tuple(
            Hosted(name, serving.config.max_batch, need[name] / sum(need.values()), serving.config.partition)
            for name, serving in hosted
            if serving is not None
        ),
    )


def _kv_bytes(costs: CostModel, config: ParallelConfig, tokens: int) -> int:
    spec = costs.spec
    cells = max(kv_extent(spec, config, Position(0, stage, 0)).cells for stage in range(config.stages))
    return 2 * spec.head_dim * costs.kv_element_bytes * cells * tokens * config.max_batch
