"""What a measured fleet is taken to be: laws that are right once steps queue behind each other, and what it can serve.

A law takes the stages of a pipeline for evenly filled and always at work, so what was lost between them while it was
measured is in its coefficients, and a simulation, in which stages wait for each other, loses it again. So the flows
that were measured are simulated by the law, request by request and for as long, and the law is fitted again to what
they would have taken without waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.fidelity.measure import Measured, degrees_of
from benchmarks.fidelity.scripts import ENGINE, MAX_BATCH, Script
from benchmarks.fidelity.steps import FLOW_SPAN_S, drawn, flow_source
from data.layout import Device, ParallelConfig
from data.models import ModelSpec
from planning.simulation.batching import BatchLimits
from planning.simulation.fleet_profile import Charges, Degrees, FleetProfile
from planning.simulation.flow import LONG_S, flow_token_s
from planning.step_laws import Observed, StepLaw, fit_law
from serving.controller.dispatch import Replica
from serving.controller.orders import kv_blocks

Laws = Mapping[Degrees, StepLaw]
Blocks = Mapping[Degrees, int]
"""Of the KV of a replica."""

_PASSES = 3
_FLOWS = 30  # times that a flow counts: runs are made of them, the rest only says what each term costs


def profile(measured: Measured, charges: Charges, spec: ModelSpec) -> FleetProfile:
    """What was measured of a fleet's steps, with what changes are charged, and room for KV as its workers have it."""
    laws = measured.laws()
    blocks = {degrees: _blocks(spec, degrees) for degrees in laws}
    return FleetProfile(laws, blocks, charges, ENGINE.step_tokens, ENGINE.block_tokens)


def _blocks(spec: ModelSpec, degrees: Degrees) -> int:
    config = ParallelConfig(1, *degrees, MAX_BATCH)
    devices = tuple(Device("any", index) for index in range(config.devices))
    return kv_blocks(spec, Replica(0, 0, config, devices, 0), ENGINE)


def calibrated(told: FleetProfile, measured: Measured, script: Script) -> FleetProfile:
    """The profile with laws by which simulated flows are as quick as the measured ones."""
    return replace(told, laws=_calibrated(told.laws, told.kv_blocks, measured, script))


def rate_rps(measured: Measured, script: Script, spec: ModelSpec) -> float:
    """How many requests of a script come in a second: its load of what the least of its layouts serves."""
    laws = measured.laws()
    blocks = {degrees: _blocks(spec, degrees) for degrees in laws}
    laws = _calibrated(laws, blocks, measured, script)
    return script.load * min(_capacity_rps(laws, blocks, script, layout) for layout in script.visited)


def _capacity_rps(laws: Laws, blocks: Blocks, script: Script, layout: str) -> float:
    """With a full batch in every replica."""
    replicas, degrees = degrees_of(layout)
    config, clients = ParallelConfig(replicas, *degrees, MAX_BATCH), replicas * MAX_BATCH
    token_s = _token_s(laws[degrees], blocks[degrees], config, clients, script, LONG_S)
    return clients / token_s / (sum(script.outputs) / 2)


def _calibrated(laws: Laws, blocks: Blocks, measured: Measured, script: Script) -> dict[Degrees, StepLaw]:
    observed = measured.by_degrees()
    return {
        degrees: _settled(law, blocks[degrees], degrees, observed[degrees], script) for degrees, law in laws.items()
    }


def _settled(law: StepLaw, blocks: int, degrees: Degrees, observed: Sequence[Observed], script: Script) -> StepLaw:
    """The law whose simulation explains what was observed. How long a flow waits is how much longer its simulation
    takes than the law says; that hardly depends on the law, so a few passes are enough.
    """
    if not any(one.clients for one in observed):
        return law
    for _ in range(_PASSES):
        told = list[Observed]()
        for one in observed:
            if not one.clients:
                told.append(one)
                continue
            config = ParallelConfig(one.replicas, *degrees, MAX_BATCH)
            simulated_s = one.drag * _token_s(law, blocks, config, one.clients, script, FLOW_SPAN_S)
            seconds = one.seconds * law.predicted_s(one, config.stages) / simulated_s
            told += _FLOWS * [replace(one, seconds=seconds)]
        law = fit_law(told, degrees[0])
    return law


def _token_s(
    law: StepLaw,
    blocks: int,
    config: ParallelConfig,
    clients: int,
    script: Script,
    span_s: tuple[float, float],
) -> float:
    """Seconds from one token of a client to its next, when so many clients send a script's requests one by one."""
    source = flow_source(clients)

    def draw() -> tuple[int, int]:
        return drawn(source, script.prompts, script.outputs)

    limits = BatchLimits(MAX_BATCH, ENGINE.step_tokens, ENGINE.block_tokens, blocks, config.stages)
    return flow_token_s(law, config, limits, clients, draw, span_s=span_s)
