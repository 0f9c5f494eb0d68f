"""The step loop of a position: a leader's with its schedulers, or a follower's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from data.models import ModelSpec
from serving.engine.scheduler import Scheduler, SchedulerLimits
from serving.messages import Adoption, Hosted, Message, Role
from serving.settings import EngineSettings
from serving.worker.leader import Leader
from serving.worker.position import Position
from serving.worker.replica import Follower, StepLoop


def step_loop(
    position: Position,
    adoptions: list[Adoption],
    specs: Mapping[str, ModelSpec],
    engine: EngineSettings,
    *,
    fail: Callable[[str], None],
    report: Callable[[Message], None],
    keepalive_s: float,
) -> StepLoop:
    """The loop of a position, before its start; a leader goes on with the requests of `adoptions`."""
    role = position.role
    if role.rank:
        return Follower(position, fail)
    schedulers = [_scheduler(role, hosted, specs[hosted.model], engine) for hosted in role.hosted]
    leader = Leader(position, schedulers, fail=fail, report=report, keepalive_s=keepalive_s)
    leader.adopt(adoptions)
    return leader


def _scheduler(role: Role, hosted: Hosted, spec: ModelSpec, engine: EngineSettings) -> Scheduler:
    limits = SchedulerLimits(
        max_batch=hosted.max_batch,
        step_tokens=engine.step_tokens,
        block_tokens=engine.block_tokens,
        blocks=hosted.kv_blocks,
        max_positions=spec.max_positions,
        plans_in_flight=role.stages,
    )
    return Scheduler(limits, spec.eos_token_ids)
