"""Step times of one stage: its layers, the embedding, the head, and the cost of driving a step.

"layers" includes what every stage pays per step (block tables, masks); "embed" and "head" are net of
that, "head" with the drawing of tokens; "step" is scheduling, and telling the other shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch

from data.models import ModelSpec
from data.profile import PHASES
from profiling.campaign import Campaign, Progress, StepTime
from profiling.driving import Driver
from profiling.grid import StepPoint
from profiling.shard import build_shard, plan_for, random_hidden
from profiling.timing import Sample, elapsed_s, repeats_for
from serving.engine.model import ShardModel
from serving.worker.groups import Group

Action = Callable[[], object]

_PREPARING = "preparing a step"
_ESSENTIAL = 4
_LEAST_MS = 0.01  # differences of medians below this are noise


@dataclass(frozen=True, slots=True)
class Series:
    """Points that one prepared part measures; `net` points have the cost of preparing a step taken off."""

    title: str
    points: list[StepPoint]
    action: Callable[[StepPoint], Action]
    net: bool = False

    @property
    def essential(self) -> list[StepPoint]:
        """What is measured even when the budget is spent: the first points of either phase."""
        return [point for phase in PHASES for point in [p for p in self.points if p.phase == phase][:_ESSENTIAL]]


class Meter:
    """Measures on the shards of `group` in step: rank 0 keeps the time and decides for all.

    After `deadline_s`, on the clock of `perf_counter`, only what is essential is measured.
    """

    def __init__(self, group: Group, device: torch.device, deadline_s: float, total: int, done: int = 0) -> None:
        self._group, self._device, self._deadline_s = group, device, deadline_s
        self.total, self.done, self.skipped = total, done, 0

    def measure(self, series: Series) -> dict[StepPoint, Sample]:
        """Time a series in rounds over its points, so that a disturbance of the machine hits all of them alike."""
        late = self._agree(int(perf_counter() >= self._deadline_s))
        points = series.essential if late else series.points
        actions = [series.action(point) for point in points]
        for action in actions:
            action()
        times_s = [[elapsed_s(action, self._device)] for action in actions]
        for _ in range(self._rounds(sum(first for (first,) in times_s), len(series.points)) - 1):
            for action, series_s in zip(actions, times_s, strict=True):
                series_s.append(elapsed_s(action, self._device))
        self.done += len(series.points)
        self.skipped += len(series.points) - len(points)
        return {point: Sample.of(series_s) for point, series_s in zip(points, times_s, strict=True)}

    def progress(self, what: str) -> Progress:
        """How far the measurement is."""
        return Progress(what, self.done, self.total)

    def _rounds(self, once_s: float, points: int) -> int:
        """Rounds that a series can have of the time that is left."""
        share_s = (self._deadline_s - perf_counter()) * points / max(self.total - self.done, 1)
        return self._agree(repeats_for(share_s, once_s))

    def _agree(self, value: int) -> int:
        """Rank 0's value (0 to 255), on every rank."""
        if self._group.rank:
            return self._group.receive_bytes(0)[0]
        for pending in [self._group.send_bytes(bytes([value]), peer) for peer in range(1, self._group.size)]:
            pending.wait()
        return value


def count_points(campaign: Campaign) -> int:
    """Measurements that `measure_steps` makes over all degrees of sharding."""
    grid = campaign.grid
    outer = len(grid.outer_points("step", 1))
    return len(grid.shards) * (4 * outer + sum(len(grid.points(1, layers)) for layers in grid.layers))


def measure_steps(
    campaign: Campaign, group: Group, device: torch.device, meter: Meter
) -> Iterator[StepTime | Progress]:
    """Times of all points with as many shards as `group` has ranks; collective, rank 0's results count."""
    preparing: dict[tuple[int, int], float] = {}
    for series in _series(campaign, group, device):
        yield meter.progress(f"{series.title}, {group.size} shard{'s' if group.size > 1 else ''}")
        results = meter.measure(series)
        if series.title == _PREPARING:
            preparing = {(point.batch, point.tokens): result.median_ms for point, result in results.items()}
            continue
        for point, result in results.items():
            yield _row(point, result, preparing.get((point.batch, point.tokens), 0.0) if series.net else 0.0)


def _series(campaign: Campaign, group: Group, device: torch.device) -> Iterator[Series]:
    """One after the other, so that only one part of the model is in memory."""
    grid, spec = campaign.grid, ModelSpec.from_json(campaign.model)

    def part(layers: int, *, first: bool = False, last: bool = False) -> Callable[[StepPoint], Action]:
        model = build_shard(campaign, layers, group, device, first=first, last=last)
        return lambda point: _forward(model, point, spec, campaign.block_tokens, device)

    yield Series(_PREPARING, grid.outer_points("step", group.size), part(0))
    for layers in grid.layers:
        yield Series(f"{layers} layer{'s' if layers > 1 else ''}", grid.points(group.size, layers), part(layers))
    yield Series("embedding", grid.outer_points("embed", group.size), part(0, first=True), net=True)
    yield Series("head", grid.outer_points("head", group.size), part(0, last=True), net=True)
    yield Series("driving a step", grid.outer_points("step", group.size), Driver(campaign, group).action)


def _forward(model: ShardModel, point: StepPoint, spec: ModelSpec, block_tokens: int, device: torch.device) -> Action:
    plan = plan_for(point, spec, block_tokens, sampled=model.place.last)
    hidden = None if model.place.first else random_hidden(model, point, spec, device)
    if not model.place.last:
        return lambda: model.forward(plan, hidden)

    return lambda: model.draw(model.forward(plan, hidden), plan)


def _row(point: StepPoint, result: Sample, less_ms: float) -> StepTime:
    return StepTime(
        phase=point.phase,
        part=point.part,
        layers=point.layers,
        shards=point.shards,
        batch=point.batch,
        tokens=point.tokens,
        context=point.context,
        time_ms=max(result.median_ms - less_ms, _LEAST_MS),
        spread_ms=result.spread_ms,
        repeats=result.repeats,
    )
