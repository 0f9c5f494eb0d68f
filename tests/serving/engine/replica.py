"""A replica inside one process: stages one after the other, the shards of a stage in threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.layout import ParallelConfig, Position
from data.models import ModelSpec
from serving.engine.batch import SequenceStep, StepPlan
from serving.engine.kv_cache import KvCache
from serving.engine.model import ShardModel
from serving.engine.place import Place
from serving.engine.sampler import sample
from serving.engine.scheduler import ScheduledRequest, Scheduler, SchedulerLimits
from serving.engine.weights import load_weights
from serving.requests import Limits, Sampling

BLOCK_TOKENS = 4
BLOCKS = 96
WAIT_S = 30.0


class Exchange:
    """The memory that the shards of one stage share."""

    def __init__(self, size: int) -> None:
        self.slots: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=WAIT_S)


@dataclass
class ThreadCommunicator:
    exchange: Exchange
    rank: int
    size: int

    def _everyones(self, tensor: Tensor) -> list[Tensor]:
        self.exchange.slots[self.rank] = tensor
        self.exchange.barrier.wait()
        everyones = [slot for slot in self.exchange.slots if slot is not None]
        self.exchange.barrier.wait()
        return everyones

    def all_reduce(self, tensor: Tensor) -> Tensor:
        first, *rest = self._everyones(tensor)
        total = first.clone()
        for other in rest:
            total += other
        return total

    def gather(self, tensor: Tensor, sizes: Sequence[int]) -> Tensor | None:
        everyones = self._everyones(tensor)
        assert [other.shape[-1] for other in everyones] == list(sizes)
        return torch.cat(everyones, -1) if self.rank == 0 else None


@dataclass
class Replica:
    checkpoint: str
    spec: ModelSpec
    stages: int = 1
    shards: int = 1
    partition: tuple[int, ...] = ()
    numerics: str = "exact"
    models: list[list[ShardModel]] = field(init=False)
    caches: list[list[KvCache]] = field(init=False)

    def __post_init__(self) -> None:
        config = ParallelConfig(1, self.stages, self.shards, 8, self.partition)
        self.pool = ThreadPoolExecutor(self.shards)
        self.models, self.caches = [], []
        for stage in range(self.stages):
            exchange = Exchange(self.shards)
            places = [Place.of(self.spec, config, Position(0, stage, shard)) for shard in range(self.shards)]
            self.caches.append([self._cache(place) for place in places])
            self.models.append(
                [self._model(place, exchange, cache) for place, cache in zip(places, self.caches[-1], strict=True)]
            )

    def _cache(self, place: Place) -> KvCache:
        spec = self.spec
        return KvCache(place.layers, place.kv_heads(spec), spec.head_dim, BLOCKS, BLOCK_TOKENS, torch.float32, "cpu")

    def _model(self, place: Place, exchange: Exchange, cache: KvCache) -> ShardModel:
        weights = load_weights(self.checkpoint, self.spec, place, dtype=torch.float32, device="cpu")
        comm = ThreadCommunicator(exchange, place.shard, self.shards)
        return ShardModel(self.spec, place, weights, numerics=self.numerics, comm=comm, cache=cache)

    def forward(self, plan: StepPlan) -> Tensor | None:
        hidden: Tensor | None = None
        for stage in self.models:
            futures = [self.pool.submit(model.forward, plan, hidden) for model in stage]
            results = [future.result(timeout=WAIT_S) for future in futures]
            if not stage[0].place.last:
                assert all(torch.equal(results[0], other) for other in results), "activations differ between shards"
            else:
                assert all(other is None for other in results[1:])
            hidden = results[0]
        return hidden

    def logits(self, tokens: Sequence[int], chunks: Sequence[int]) -> list[Tensor]:
        """Logits after each chunk of one sequence; a chunk of 1 is a decode step."""
        result, start = [], 0
        blocks = list(range(BLOCKS - 1, BLOCKS - 1 - (len(tokens) // BLOCK_TOKENS + 1), -1))
        for number, count in enumerate(chunks):
            part = list(tokens[start : start + count])
            step = SequenceStep(0, start, part, blocks, Sampling(), 0)
            logits = self.forward(StepPlan(number, [step]))
            assert logits is not None
            result.append(logits[0])
            start += count
        return result


@dataclass(frozen=True)
class Stream:
    """What became of one request: its tokens and the logits each was drawn from."""

    tokens: list[int]
    logits: list[Tensor]


def serve(
    replica: Replica,
    prompts: Sequence[Sequence[int]],
    *,
    committed: Sequence[Sequence[int]] = (),
    max_tokens: int = 12,
    max_batch: int = 8,
    step_tokens: int = 16,
    blocks: int = BLOCKS,
    temperature: float = 0.0,
) -> list[Stream]:
    """Run requests to their end; `committed` are outputs known from before (they have no logits)."""
    spec = replica.spec
    scheduler = Scheduler(SchedulerLimits(max_batch, step_tokens, BLOCK_TOKENS, blocks, spec.max_positions), ())
    streams = []
    for key, prompt in enumerate(prompts):
        output = list(committed[key]) if committed else []
        sampling = Sampling(temperature=temperature, seed=key)
        scheduler.add(ScheduledRequest(key, prompt, output, sampling, Limits(max_tokens=max_tokens)))
        streams.append(Stream(output, []))
    while plan := scheduler.schedule(0.0):
        logits = replica.forward(plan)
        rows = [step.key for step in plan.sequences if step.sampling is not None]
        for row, key in enumerate(rows):
            assert logits is not None
            streams[key].logits.append(logits[row].clone())
        scheduler.complete(plan, [] if logits is None else sample(logits, plan))
    assert scheduler.running == scheduler.waiting == 0
    return streams
