"""What a simulation is told of a fleet: laws that are right once steps queue behind each other; and what it can serve.

A law takes the stages of a pipeline for evenly filled and always at work, so what was lost between them while it was
measured is in its coefficients, and a simulation, in which stages wait for each other, loses it again. So the flows
that were measured are simulated by the law, and it is scaled by how much too slow or too quick they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from benchmarks.fidelity.measure import Measured, degrees_of
from benchmarks.fidelity.scripts import ENGINE, MAX_BATCH, Script
from data.layout import Device, ParallelConfig
from data.models import ModelSpec
from planning.simulation.fleet_profile import Charges, Degrees, FleetProfile
from planning.simulation.flow import flow_token_s
from planning.step_laws import Observed, StepLaw
from serving.controller.dispatch import Replica
from serving.controller.orders import kv_blocks

_FULL = 2  # sequences in every step: all stages of all replicas are then at work


def profile(measured: Measured, charges: Charges, spec: ModelSpec) -> FleetProfile:
    """What was measured, as it is."""
    laws = measured.laws()
    blocks = {degrees: _blocks(spec, degrees) for degrees in laws}
    return FleetProfile(laws, blocks, charges, ENGINE.step_tokens, ENGINE.block_tokens)


def _blocks(spec: ModelSpec, degrees: Degrees) -> int:
    config = ParallelConfig(1, *degrees, MAX_BATCH)
    devices = tuple(Device("any", index) for index in range(config.devices))
    return kv_blocks(spec, Replica(0, 0, config, devices, 0), ENGINE)


def capacity_rps(told: FleetProfile, script: Script) -> float:
    """Requests of a script that the least of its layouts serves in a second, with a full batch in every replica."""
    return min(_capacity_rps(told, script, layout) for layout in script.visited)


def _capacity_rps(told: FleetProfile, script: Script, layout: str) -> float:
    replicas, degrees = degrees_of(layout)
    config, clients = ParallelConfig(replicas, *degrees, MAX_BATCH), replicas * MAX_BATCH
    token_s = _token_s(told, config, clients, script)
    return clients / token_s / (sum(script.outputs) / 2)


def _token_s(told: FleetProfile, config: ParallelConfig, clients: int, script: Script) -> float:
    """Seconds from one token of a client to its next, when so many clients send a script's requests for ever."""
    source = random.Random(clients)

    def draw() -> tuple[int, int]:
        return source.randint(*script.prompts), source.randint(*script.outputs)

    law, limits = told.laws[config.stages, config.shards], told.limits(replace(config, replicas=1))
    return flow_token_s(law, config, limits, clients, draw)


def calibrated(told: FleetProfile, measured: Measured, script: Script) -> FleetProfile:
    """The profile with laws by which simulated flows are as quick as the measured ones, in the median."""
    observed = measured.by_degrees()
    factors = {degrees: _factor(told, degrees, observed[degrees], script) for degrees in told.laws}
    return replace(told, laws={degrees: _scaled(law, factors[degrees]) for degrees, law in told.laws.items()})


def _scaled(law: StepLaw, factor: float) -> StepLaw:
    coefficients = tuple(factor * one for one in law.coefficients)
    return replace(law, coefficients=coefficients, overhead_s=factor * law.overhead_s)


def _factor(told: FleetProfile, degrees: Degrees, observed: Sequence[Observed], script: Script) -> float:
    ratios = [
        flow.seconds / (flow.drag * _token_s(told, config, clients, script))
        for flow, config, clients in full_flows(degrees, observed)
    ]
    return median(ratios) if ratios else 1.0


def full_flows(degrees: Degrees, observed: Sequence[Observed]) -> Iterator[tuple[Observed, ParallelConfig, int]]:
    """Flows that kept all stages at work, the replicas that they kept at work, and their clients."""
    stages, shards = degrees
    for one in observed:
        sequences = one.steps[-1].sequences
        if 0.0 < one.admitted < 1.0 and one.busy % stages == 0 and sequences >= _FULL:
            yield one, ParallelConfig(one.busy // stages, stages, shards, MAX_BATCH), round(sequences * one.busy)
