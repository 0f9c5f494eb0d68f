"""What a decode step costs on one GPU: `python -m benchmarks.decode --out DIR [--layers N --batch 1,8,32,128]`.

Random weights of the true shapes, made on the device; every step is a new plan, as in serving: its
tensors are made and copied, the step computed, greedy tokens drawn and fetched. Three ways: the
framework's kernels, own kernels launched one by one, and recorded steps.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.catalog import model_shape
from data.errors import InvalidInput
from data.models import ModelSpec
from profiling.fingerprint import this_machine
from profiling.timing import Sample, elapsed_s
from serving.engine.batch import SequenceStep, StepPlan
from serving.engine.blocks import blocks_for
from serving.engine.graphs import graph_sizes
from serving.engine.kv_cache import KvCache
from serving.engine.model import ShardModel
from serving.engine.place import Place, SoloCommunicator
from serving.requests import Sampling

BAR_MS = 12.0  # of a recorded step with 32 sequences of 2048 tokens, Llama-3-8B on an H200
_BLOCK_TOKENS = 16
_WARM_STEPS = 3
_WAYS = ("framework", "eager", "recorded")


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.decode", description=__doc__)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=0, help="0: as many as the model has")
    parser.add_argument("--batch", default="1,8,32,128")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True, help="folder for decode.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise InvalidInput("this benchmark measures a CUDA device; there is none here")
    spec = model_shape(arguments.model)
    spec = replace(spec, layers=arguments.layers or spec.layers)
    batches = [int(size) for size in arguments.batch.split(",")]
    result = run(spec, batches, arguments.context, arguments.steps)
    print(json.dumps(result, indent=2))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "decode.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


@torch.inference_mode()
def run(spec: ModelSpec, batches: list[int], context: int, steps: int) -> dict[str, Any]:
    """Milliseconds per step by way and batch; a floor from the bytes a step must read; times to record."""
    device = torch.device("cuda", 0)
    place = Place((0, spec.layers), 0, 1, first=True, last=True)
    weights = random_weights(spec, place, device)
    blocks = max(batches) * blocks_for(context + steps + _WARM_STEPS, _BLOCK_TOKENS)
    cache = KvCache(place.layers, place.kv_heads(spec), spec.head_dim, blocks, _BLOCK_TOKENS, torch.bfloat16, device)
    for layer in range(spec.layers):
        for pages in cache.pages(layer):
            pages.normal_()
    rows: list[dict[str, Any]] = [{"batch": batch} for batch in batches]
    recording_ms: dict[int, float] = {}
    for way in _WAYS:  # one at a time: each joins matrices of its own
        numerics = "framework" if way == "framework" else "native"
        model = ShardModel(spec, place, weights, numerics=numerics, comm=SoloCommunicator(), cache=cache)
        if way == "recorded":
            model.warm(graph_sizes(max(batches))[:1])  # compiles
            recording_ms = model.warm(graph_sizes(max(batches)))
        for row in rows:
            row |= _measure(model, way, cache, row["batch"], context, steps)
        del model
        torch.cuda.empty_cache()
    bandwidth = copy_bandwidth(device)
    for row in rows:
        row["floor_ms"] = round(_bytes_read(spec, weights, row["batch"], context) / bandwidth * 1e3, 3)
    return {
        "model": spec.name,
        "layers": spec.layers,
        "context": context,
        "steps": steps,
        "bar_ms": BAR_MS,
        "copy_bandwidth_bytes_per_s": round(bandwidth),
        "rows": rows,
        "recording_ms": {str(size): round(taken_ms, 1) for size, taken_ms in sorted(recording_ms.items())},
        "fingerprint": this_machine("cuda", dtype="bfloat16").to_json(),
    }


def random_weights(spec: ModelSpec, place: Place, device: torch.device) -> dict[str, Tensor]:
    """bfloat16 weights of a size that keeps activations finite."""
    torch.manual_seed(0)
    return {
        tensor.name: torch.randn(
            [high - low for low, high in zip(start, stop, strict=True)], dtype=torch.bfloat16, device=device
        ).mul_(tensor.shape[-1] ** -0.5)
        for tensor, start, stop in place.boxes(spec)
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read plus written, of a large copy on the device."""
    source = torch.randn(1 << 29, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times_s = [elapsed_s(lambda: target.copy_(source), device) for _ in range(8)]
    return 2 * source.nbytes / sorted(times_s)[len(times_s) // 2]


def _measure(
    model: ShardModel, way: str, cache: KvCache, batch: int, context: int, steps: int
) -> dict[str, float | None]:
    """Milliseconds of a step as served; None where the device's memory does not suffice."""
    times_s = []
    try:
        for step in range(steps + _WARM_STEPS):
            plan = _plan(model.spec, cache, batch, context + step - steps - _WARM_STEPS)
            begun = time.perf_counter()
            model.draw(model.forward(plan, None), plan)
            times_s.append(time.perf_counter() - begun)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {f"{way}_ms": None}
    sample = Sample.of(times_s[_WARM_STEPS:])
    times: dict[str, float | None] = {
        f"{way}_ms": round(sample.median_ms, 3),
        f"{way}_spread_ms": round(sample.spread_ms, 3),
    }
    if way == "recorded":
        times["recorded_device_ms"] = round(_device_ms(model, cache, batch, context), 3)
    return times


def _device_ms(model: ShardModel, cache: KvCache, batch: int, context: int) -> float:
    """Device time of a recorded step, without drawing: many in a row."""
    plan = _plan(model.spec, cache, batch, context - 1)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(20):
        model.forward(plan, None)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 20


def _plan(spec: ModelSpec, cache: KvCache, batch: int, position: int) -> StepPlan:
    each = blocks_for(position + 1, _BLOCK_TOKENS)
    return StepPlan(
        1,
        [
            SequenceStep(
                key,
                position,
                [(key * 31 + position) % spec.vocab],
                list(range(key, batch * each, batch)),
                Sampling(),
                0,
            )
            for key in range(batch)
        ],
    )


def _bytes_read(spec: ModelSpec, weights: dict[str, Tensor], batch: int, context: int) -> int:
    """Every weight once (of the embedding a row per sequence, which is little), every cached token once."""
    matrices = sum(weight.nbytes for name, weight in weights.items() if "embed" not in name or spec.tied_embeddings)
    return matrices + batch * context * spec.layers * 2 * spec.kv_heads * spec.head_dim * 2


if __name__ == "__main__":
    raise SystemExit(main())
