"""How to cut a model's layers into pipeline stages: the cut whose slowest stage is quickest, exactly.

Alpa's inter-operator dynamic program for inference (Zheng et al., OSDI 2022; Li et al., OSDI 2023, §4.1): forward only,
so a stage takes the sum of its layers, and F(s, k) = min over i of max(F(s - 1, i), cost of layers i … k - 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from data.errors import Infeasible, InvalidInput
from data.placement import Shape, StageProfile

Cost = Callable[[float, float], float]  # of a stage, from its seconds and bytes

_ORDER = 1e-12  # relative: sums of the same layers in another order


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer on one device of a stage: seconds per request and bytes of weights, by number of shards."""

    seconds: Mapping[int, float]
    weight_bytes: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class StageCut:
    """Layers per stage, with the seconds and weights (per device) of each."""

    layers: tuple[int, ...]
    seconds: tuple[float, ...]
    weight_bytes: tuple[float, ...]

    @property
    def profile(self) -> StageProfile:
        """The cut as placement takes it."""
        return StageProfile(self.seconds, self.weight_bytes)


def cut_stages(layers: Sequence[LayerCost], shape: Shape, budget_bytes: float = inf) -> StageCut:
    """The partition into `shape.stages` stages of which each fits the budget and the slowest is quickest.

    Of equally quick ones, that whose largest stage is smallest. O(layers² × stages). Raises `InvalidInput` with fewer
    layers than stages or costs missing for `shape.shards`, `Infeasible` if no partition fits.
    """
    if len(layers) < shape.stages:
        raise InvalidInput(f"{len(layers)} layers make no {shape.stages} stages; use fewer stages")
    if any(shape.shards not in layer.seconds or shape.shards not in layer.weight_bytes for layer in layers):
        raise InvalidInput(f"costs of {shape.shards} shards are missing for some layers; profile them")
    seconds = list(accumulate((layer.seconds[shape.shards] for layer in layers), initial=0.0))
    weights = list(accumulate((layer.weight_bytes[shape.shards] for layer in layers), initial=0.0))
    slowest = _least(seconds, weights, shape.stages, lambda took, held: took if held <= budget_bytes else inf)[0]
    if slowest == inf:
        raise Infeasible(
            f"no cut into {shape.stages} stages fits {budget_bytes:.4g} bytes a device; use more stages or shards"
        )
    limit = slowest * (1 + _ORDER)
    ends = _least(
        seconds, weights, shape.stages, lambda took, held: held if took <= limit and held <= budget_bytes else inf
    )[1]
    edges = [0, *ends]
    return StageCut(
        layers=tuple(end - begin for begin, end in zip(edges, ends, strict=False)),
        seconds=tuple(seconds[end] - seconds[begin] for begin, end in zip(edges, ends, strict=False)),
        weight_bytes=tuple(weights[end] - weights[begin] for begin, end in zip(edges, ends, strict=False)),
    )


def _least(
    seconds: Sequence[float], weights: Sequence[float], stages: int, cost: Cost
) -> tuple[float, list[int]]:  # fmt: skip
    """The least largest cost of a stage, and where the stages end (the earliest cuts on ties)."""
    count = len(seconds) - 1
    best = [0.0] + [inf] * count
    cuts: list[list[int]] = []
    for _ in range(stages):
        found = [inf] * (count + 1)
        cut = [0] * (count + 1)
        for end in range(1, count + 1):
            for begin in range(end):
                value = max(best[begin], cost(seconds[end] - seconds[begin], weights[end] - weights[begin]))
                if value < found[end]:
                    found[end], cut[end] = value, begin
        best = found
        cuts.append(cut)
    ends = [count]
    for cut in reversed(cuts[1:]):
        ends.append(cut[ends[-1]])
    return best[count], ends[::-1]
