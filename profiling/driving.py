"""What a leader does around the computation of a step: schedule, tell the other shards, account for tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from profiling.campaign import Campaign
from profiling.grid import DECODE, StepPoint
from serving.engine.batch import SampledToken, StepPlan
from serving.engine.blocks import blocks_for
from serving.engine.scheduler import ScheduledRequest, Scheduler, SchedulerLimits
from serving.requests import Limits
from serving.worker.groups import Group

_LONGEST = 1 << 20  # positions; no request of a measurement reaches it
_STEPS = 64  # decode steps that the KV blocks of one measurement suffice for
_decoder = msgspec.msgpack.Decoder(StepPlan)


class Driver:
    """The leader's work on rank 0, and the receipt of its plans on the others."""

    def __init__(self, campaign: Campaign, group: Group) -> None:
        self._group = group
        self._block_tokens = campaign.block_tokens

    def action(self, point: StepPoint) -> Callable[[], object]:
        """One step of the point's shape, without its computation."""
        if self._group.rank:
            return self._follow
        steps = self._decode_steps(point) if point.phase == DECODE else self._prefill_steps(point)
        return lambda: next(steps)

    def _follow(self) -> None:
        _decoder.decode(self._group.receive_bytes(0))

    def _decode_steps(self, point: StepPoint) -> Iterator[None]:
        scheduler = self._scheduler(point, tokens=_STEPS)
        for key in range(point.batch):
            scheduler.add(ScheduledRequest(key, [1], limits=Limits(max_tokens=_LONGEST)))
        while True:
            self._step(scheduler)
            yield

    def _prefill_steps(self, point: StepPoint) -> Iterator[None]:
        scheduler = self._scheduler(point, tokens=point.tokens)
        prompt = [1] * point.tokens
        while True:
            for key in range(point.batch):
                scheduler.add(ScheduledRequest(key, prompt, limits=Limits(max_tokens=1)))
            self._step(scheduler)
            yield

    def _scheduler(self, point: StepPoint, *, tokens: int) -> Scheduler:
        limits = SchedulerLimits(
            max_batch=point.batch,
            step_tokens=point.batch * point.tokens,
            block_tokens=self._block_tokens,
            blocks=point.batch * blocks_for(tokens + 1, self._block_tokens),
            max_positions=_LONGEST,
        )
        return Scheduler(limits, ())

    def _step(self, scheduler: Scheduler) -> None:
        plan = scheduler.schedule(0.0)
        assert plan is not None, "every measured step has work"
        payload = msgspec.msgpack.encode(plan)
        for pending in [self._group.send_bytes(payload, peer) for peer in range(1, self._group.size)]:
            pending.wait()
        scheduler.complete(plan, [SampledToken(sequence.key, 0, 0.0, []) for sequence in plan.sequences])
