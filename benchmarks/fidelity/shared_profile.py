"""What admission and simulation are told of a fleet of several models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.fidelity.scripts import ENGINE
from benchmarks.fidelity.shared_scripts import MAX_BATCH, SharedScript
from data.deployment import SharedGroup
from data.layout import Device
from data.models import ModelSpec
from data.shared_plan import Speed
from planning.load import Pace
from planning.simulation.shared_fleet import Shape, SharedProfile
from planning.step_laws import Observed, StepLaw, fit_law, mix_of, prompt_steps
from serving.controller.dispatch import Replica
from serving.controller.orders import kv_blocks

_CONTEXTS = (16, 32, 48, 64)  # of a typical full batch
_PROMPT = 48


def laws_of(script: SharedScript, steps: Sequence[tuple[str, Observed]]) -> dict[Shape, StepLaw]:
    """The law of every model.

    A model that was never seen with all groups at work: what that does to it is taken from one that was, for they
    share the processors.
    """
    observed = by_model(steps)
    laws = {shape: fit_law(observed[model], shape[1]) for model, shape in script.shapes.items()}
    widest = max((law.slowness for law in laws.values()), key=len)
    return {shape: replace(law, slowness=law.slowness + widest[len(law.slowness) :]) for shape, law in laws.items()}


def by_model(steps: Sequence[tuple[str, Observed]]) -> dict[str, list[Observed]]:
    """The observations of steps, in the order in which they were made."""
    found: dict[str, list[Observed]] = defaultdict(list)
    for model, observed in steps:
        found[model].append(observed)
    return found


def speeds_of(script: SharedScript, laws: Mapping[Shape, StepLaw]) -> list[Speed]:
    """How quick a full batch is while all groups are at work: what the plan book tells admission."""
    busy = script.deployment.devices
    found = []
    for shape, law in laws.items():
        stages = shape[1]
        step_s, prompt_s = (
            stages * law.slow(busy) * sum(map(law.work_s, steps))
            for steps in (
                [mix_of([(context, 1) for context in _CONTEXTS[: -(-MAX_BATCH // stages)]], ENGINE.block_tokens)],
                prompt_steps(_PROMPT, ENGINE.step_tokens, ENGINE.block_tokens),
            )
        )
        found.append(Speed(*shape, prompt_s / _PROMPT, step_s))
    return found


def paces_told(speeds: Sequence[Speed]) -> dict[Shape, Pace]:
    """As admission reads them."""
    return {(one.model, one.stages, one.shards): Pace(one.prefill_token_s, one.step_s, MAX_BATCH) for one in speeds}


def profile_of(
    script: SharedScript,
    steps: Sequence[tuple[str, Observed]],
    speeds: Sequence[Speed],
    specs: Mapping[str, ModelSpec],
) -> SharedProfile:
    """What the simulation is told of the fleet."""
    laws = laws_of(script, steps)
    blocks = {
        (hosted.model, group.stages, group.shards): _blocks(specs[hosted.model], group, hosted.model)
        for group in script.groups
        for hosted in group.hosted
    }
    return SharedProfile(laws, blocks, paces_told(speeds), ENGINE.step_tokens, ENGINE.block_tokens)


def _blocks(spec: ModelSpec, group: SharedGroup, model: str) -> int:
    hosted = next(one for one in group.hosted if one.model == model)
    devices = tuple(Device("any", index) for index in range(group.devices))
    return kv_blocks(spec, Replica(0, 0, group.config(hosted), devices, 0, model, hosted.kv_share), ENGINE)
