"""Random fleets: what lives, what is usable, what is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from data.layout import Device, ParallelConfig, Position
from data.models import ModelSpec
from planning.resharding import Box, weight_boxes
from planning.transition import LiveReplica, Transition, plan_transition

SPEC = ModelSpec(
    name="tiny",
    family="llama",
    layers=4,
    hidden=16,
    heads=4,
    kv_heads=2,
    head_dim=4,
    ffn=24,
    vocab=32,
    max_positions=64,
)


@dataclass(frozen=True)
class Scene:
    """A fleet before a transition. Devices of live replicas that are not usable are leaving."""

    live: tuple[LiveReplica, ...]
    usable: tuple[Device, ...]
    resident: dict[Device, tuple[Box, ...]]
    target: ParallelConfig

    def transition(self) -> Transition:
        return plan_transition(
            SPEC, self.target, live=self.live, usable=self.usable, resident=self.resident, element_bytes=4
        )


@st.composite
def configs(draw: st.DrawFn, most: int) -> ParallelConfig:
    stages = draw(st.integers(1, min(4, most)))
    shards = draw(st.integers(1, min(4, most // stages)))
    replicas = draw(st.integers(1, most // (stages * shards)))
    return ParallelConfig(replicas, stages, shards, draw(st.sampled_from([2, 4])))


@st.composite
def scenes(draw: Any) -> Scene:
    devices = [Device(f"i{instance}", index) for instance in range(draw(st.integers(1, 4))) for index in range(2)]
    config = draw(configs(len(devices)))
    shuffled = draw(st.permutations(devices))
    size = config.replica_devices
    first = draw(st.integers(1, 50))
    count = draw(st.integers(0, config.replicas))
    live = tuple(
        LiveReplica(
            first + 3 * index,
            ParallelConfig(1, config.stages, config.shards, config.max_batch),
            tuple(shuffled[index * size : (index + 1) * size]),
            draw(st.integers(0, 100)),
        )
        for index in range(count)
    )
    leaving = draw(st.sets(st.sampled_from(devices), max_size=len(devices) - 1))
    usable = tuple(device for device in devices if device not in leaving)
    resident = {
        device: weight_boxes(SPEC, config, Position(0, rank // config.shards, rank % config.shards))
        for replica in live
        for rank, device in enumerate(replica.devices)
    }
    for device in draw(st.sets(st.sampled_from(devices))):  # spare holders, and some that restarted
        other = draw(configs(4))
        idle = device not in {d for replica in live for d in replica.devices}
        if idle:
            resident[device] = weight_boxes(SPEC, other, draw(st.sampled_from(list(other.positions()))))
        elif draw(st.booleans()):
            del resident[device]
    return Scene(live, usable, resident, draw(configs(len(usable))))
