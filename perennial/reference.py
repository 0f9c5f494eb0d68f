"""The undisturbed run: the same requests on one device in this process, nothing ever happening to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from data.errors import InvalidInput
from data.layout import ParallelConfig, Position
from data.models import ModelSpec, kv_head_range
from serving.engine.blocks import blocks_for
from serving.engine.kv_cache import KvCache
from serving.engine.model import ShardModel
from serving.engine.place import Place, SoloCommunicator
from serving.engine.scheduler import ScheduledRequest, Scheduler, SchedulerLimits
from serving.engine.weights import load_weights, read_spec
from serving.requests import GenerationRequest
from serving.settings import EngineSettings
from serving.worker.build import compute_device, weight_dtype

_TOGETHER = 16  # requests computed at once


def reference_streams(
    checkpoint: str,
    requests: Iterable[GenerationRequest],
    *,
    engine: EngineSettings | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[int]]:
    """The tokens of every request by its id, computed with one stage and one shard.

    `progress` is called with the number of requests that are done. Deadlines are ignored. Raises
    `InvalidInput` for stop strings, which belong to the service.
    """
    wanted = list(requests)
    if any(request.limits.stop for request in wanted):
        raise InvalidInput("the reference run knows no stop strings; compare with stop_token_ids instead")
    engine = engine or EngineSettings()
    spec = read_spec(checkpoint)
    blocks = _TOGETHER * blocks_for(max((_tokens(request) for request in wanted), default=1), engine.block_tokens)
    scheduler = Scheduler(_limits(spec, engine, blocks), spec.eos_token_ids)
    model = _whole_model(checkpoint, spec, engine, blocks)
    for key, request in enumerate(wanted):
        scheduler.add(ScheduledRequest(key, request.prompt, sampling=request.sampling, limits=request.limits))
    outputs: dict[int, list[int]] = {key: [] for key in range(len(wanted))}
    done = 0
    while not scheduler.idle:
        ended = scheduler.expire(0.0)
        plan = scheduler.schedule(0.0)
        if plan is not None:
            logits = model.forward(plan, None)
            ended += scheduler.complete(plan, model.draw(logits, plan))
        for emission in ended:
            if emission.token is not None:
                outputs[emission.key].append(emission.token)
            done += emission.finish is not None
        if progress is not None and any(emission.finish for emission in ended):
            progress(done)
    return {request.request_id: outputs[key] for key, request in enumerate(wanted)}


def _tokens(request: GenerationRequest) -> int:
    return len(request.prompt) + request.limits.max_tokens


def _limits(spec: ModelSpec, engine: EngineSettings, blocks: int) -> SchedulerLimits:
    return SchedulerLimits(_TOGETHER, engine.step_tokens, engine.block_tokens, blocks, spec.max_positions)


def _whole_model(checkpoint: str, spec: ModelSpec, engine: EngineSettings, blocks: int) -> ShardModel:
    device = compute_device(engine, 0)
    dtype: torch.dtype = weight_dtype(engine)
    place = Place.of(spec, ParallelConfig(1, 1, 1, _TOGETHER), Position(0, 0, 0))
    cache = KvCache(
        place.layers,
        kv_head_range(spec, 0, 1),
        spec.head_dim,
        blocks=blocks,
        block_tokens=engine.block_tokens,
        dtype=dtype,
        device=device,
    )
    weights = load_weights(checkpoint, spec, place, dtype=dtype, device=device)
    return ShardModel(spec, place, weights, numerics=engine.numerics, comm=SoloCommunicator(), cache=cache)
