"""Uneven pipelines: fewer layers where a stage also embeds, drives the step or ends in the head."""

from __future__ import annotations

from data.layout import ParallelConfig
from data.placement import Shape
from planning.costs import CostModel
from planning.stages import LayerCost, cut_stages

_WORTH = 0.95  # of the balanced step: to gain less is within the error of a profile


def quickest_partition(costs: CostModel, shape: Shape, batch: int, context: int) -> tuple[int, ...]:
    """Layers of every stage such that the slowest stage of a decode step is quickest; empty where balanced is as quick.

    `planning.stages.cut_stages` on the fitted costs: what a stage costs beside its layers falls to its first or last
    one. Memory is not looked at: whether the result fits is asked where it is used.
    """
    spec, stages = costs.spec, shape.stages
    if stages == 1:
        return ()
    balanced = ParallelConfig(1, stages, shape.shards, batch)
    part = -(-batch // min(batch, stages))  # requests of one of the steps in flight, as `CostModel.decode_s` has it
    step = (shape.shards, part, 1, context)
    each_ms = costs.step_ms("decode", spec.layers, *step) / spec.layers
    times_ms = [each_ms] * spec.layers
    for layer, stage in ((0, 0), (-1, stages - 1)):
        start, stop = balanced.stage_layers(stage, spec.layers)
        own_ms = costs.stage_ms("decode", balanced, stage, batch=part, tokens=1, context=context)
        times_ms[layer] += own_ms - costs.step_ms("decode", stop - start, *step)
    # A layer weighs one, so that of equally quick cuts the one with the smallest stages is taken.
    layers = [LayerCost({shape.shards: time_ms}, {shape.shards: 1.0}) for time_ms in times_ms]
    partition = cut_stages(layers, shape).layers
    uneven = ParallelConfig(1, stages, shape.shards, batch, partition)
    if costs.decode_s(uneven, batch, context) < _WORTH * costs.decode_s(balanced, batch, context):
        return partition
    return ()
