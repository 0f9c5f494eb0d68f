"""Builds what a role needs on this device: groups, and for every model of it a cache and a model part."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from data.deployment import tensor_name
from data.errors import InvalidInput
from data.layout import ParallelConfig
from data.layout import Position as Coordinates
from data.models import ModelSpec, kv_head_range
from planning.resharding import Box
from serving.engine.free import FreeModel
from serving.engine.graphs import graph_sizes
from serving.engine.kv_cache import KvCache
from serving.engine.model import ShardModel
from serving.engine.place import Place
from serving.engine.rehearsal import rehearse
from serving.messages import Hosted, Role
from serving.settings import EngineSettings
from serving.worker.communicators import Communicators
from serving.worker.groups import Group, Hop, Waiting
from serving.worker.movement import HeldTensor
from serving.worker.position import ModelPart, Position
from serving.worker.window import Windows

logger = logging.getLogger(__name__)

_COPYING_THREADS = 8  # beside a GPU, processors only copy memory


def compute_device(engine: EngineSettings, index: int) -> torch.device:
    """The device of worker `index`. Raises `InvalidInput` if this host lacks it."""
    copying = 1 if engine.device == "cpu" else min(_COPYING_THREADS, (os.cpu_count() or 1) // 4)
    torch.set_num_threads(max(engine.threads, copying))
    if engine.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise InvalidInput(f"device {engine.device}:{index} does not exist here; use --device cpu or fewer devices")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def weight_dtype(engine: EngineSettings) -> torch.dtype:
    """The dtype weights are held and moved in."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[engine.dtype]


def numerics_of(engine: EngineSettings) -> str:
    """`auto` resolved: exact on CPU, native elsewhere."""
    return ("exact" if engine.device == "cpu" else "native") if engine.numerics == "auto" else engine.numerics


def rehearse_models(specs: Iterable[ModelSpec], engine: EngineSettings, device: torch.device) -> None:
    """Compile and load what steps of these models take; what cannot be now will be when it is needed."""
    began = time.monotonic()
    try:
        for spec in specs:
            rehearse(spec, weight_dtype(engine), device, engine.block_tokens)
    except RuntimeError as error:  # for want of memory, say
        logger.warning("kernels could not be rehearsed: %s", error)
    else:
        logger.info("kernels compiled and loaded in %.1f s", time.monotonic() - began)


@dataclass(frozen=True, slots=True)
class Build:
    """The circumstances of one epoch on one worker."""

    specs: Mapping[str, ModelSpec]
    store: dist.Store
    epoch: int
    device: torch.device
    host: str
    timeout_s: float
    engine: EngineSettings
    communicators: Communicators
    rest_s: float = 0.0  # between parts of long work, where something is served meanwhile

    def group(
        self,
        name: str,
        members: Sequence[str],
        own: str,
        *,
        waiting: Waiting | None = None,
        ranks: Sequence[int] | None = None,
        windows: Windows | None = None,
        of_bytes: bool = False,
    ) -> Group:
        """Meet `members`, in their role called `ranks`; collective."""
        prefix = f"{self.epoch}/{name}"
        return Group(
            self.store,
            prefix,
            list(members).index(own),
            len(members),
            device=self.device,
            host=self.host,
            timeout_s=self.timeout_s,
            waiting=waiting,
            ranks=ranks,
            windows=windows,
            of_bytes=of_bytes,
            members=members,
            communicators=self.communicators,
        )


def build_position(build: Build, role: Role, tensors: Mapping[str, HeldTensor]) -> Position:
    """Groups of the role and of its stage, and for every model a KV cache and its part over `tensors`; collective."""
    name, own = f"r{role.hosted[0].replica}", role.members[role.rank]
    group = build.group(name, role.members, own, of_bytes=True)
    hops = _hops(build, role, group)
    if numerics_of(build.engine) == "free":
        return Position(role, tuple(_free_part(build, role, hosted) for hosted in role.hosted), group, *hops)
    stage = role.rank // role.shards
    ranks = range(stage * role.shards, (stage + 1) * role.shards)
    peers = [role.members[rank] for rank in ranks]
    comm = build.group(f"{name}s{stage}", peers, own, waiting=group.waiting, ranks=ranks)
    parts = tuple(_model_part(build, role, hosted, tensors, comm) for hosted in role.hosted)
    return Position(role, parts, group, *hops, comm)


def _place(build: Build, role: Role, hosted: Hosted) -> Place:
    stage, shard = divmod(role.rank, role.shards)
    config = ParallelConfig(1, role.stages, role.shards, hosted.max_batch, tuple(hosted.partition))
    return Place.of(build.specs[hosted.model], config, Coordinates(0, stage, shard))


def _cache(build: Build, place: Place, hosted: Hosted) -> KvCache:
    spec = build.specs[hosted.model]
    return KvCache(
        place.layers,
        kv_head_range(spec, place.shard, place.shards),
        spec.head_dim,
        blocks=hosted.kv_blocks,
        block_tokens=build.engine.block_tokens,
        dtype=weight_dtype(build.engine),
        device=build.device,
    )


def _free_part(build: Build, role: Role, hosted: Hosted) -> ModelPart:
    model = FreeModel(build.specs[hosted.model], build.engine.free_step_s)
    return ModelPart(hosted, model, _cache(build, _place(build, role, hosted), hosted))


def _model_part(build: Build, role: Role, hosted: Hosted, tensors: Mapping[str, HeldTensor], comm: Group) -> ModelPart:
    spec, place = build.specs[hosted.model], _place(build, role, hosted)
    cache = _cache(build, place, hosted)
    # What is resident may be more than this position needs.
    weights = {
        part.name: tensors[name].view(Box(name, *box))
        for part, *box in place.boxes(spec)
        for name in [tensor_name(hosted.model, part.name)]
    }
    model = ShardModel(
        spec,
        place,
        weights,
        numerics=numerics_of(build.engine),
        comm=comm,
        cache=cache,
        timeout_s=build.timeout_s,
        rest_s=build.rest_s,
    )
    # Twice as many rows: restored requests have a token or two to compute again, all of them in one step.
    model.warm(graph_sizes(2 * hosted.max_batch))
    return ModelPart(hosted, model, cache)


def _hops(build: Build, role: Role, group: Group) -> tuple[Hop | None, Hop | None]:
    """From the stage before and to the one after, shard by shard; between GPUs by a group for each pair."""
    found: list[Hop | None] = []
    for low, high in ((role.rank - role.shards, role.rank), (role.rank, role.rank + role.shards)):
        peer = low + high - role.rank
        if not 0 <= peer < len(role.members):
            found.append(None)
        elif build.device.type == "cpu":
            found.append(Hop(group, peer))
        else:
            pair = [role.members[low], role.members[high]]
            name, own = f"r{role.hosted[0].replica}h{low}", role.members[role.rank]
            met = build.group(name, pair, own, waiting=group.waiting, ranks=(low, high))
            found.append(Hop(met, int(role.rank == low)))
    before, after = found
    return before, after
