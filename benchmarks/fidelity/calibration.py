"""Laws that are right once steps queue behind each other.

A law takes the stages of a pipeline for evenly filled and always at work, so what was lost between them while it was
measured is in its coefficients, and a simulation, in which stages wait for each other, loses it again. So the flows
that were measured are simulated by the law, and it is scaled by how much too slow or too quick they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

from benchmarks.fidelity.measure import Measured
from benchmarks.fidelity.scripts import MAX_BATCH, Script
from data.layout import ParallelConfig
from planning.simulation.fleet_profile import Degrees, FleetProfile
from planning.simulation.flow import flow_token_s
from planning.step_laws import Observed, StepLaw

_FULL = 2  # sequences in every step: all stages of all replicas are then at work


def calibrated(told: FleetProfile, measured: Measured, script: Script) -> FleetProfile:
    """The profile with laws by which simulated flows are as quick as the measured ones, in the median."""
    observed = measured.by_degrees()
    factors = {degrees: _factor(told, degrees, observed[degrees], script) for degrees in told.laws}
    return replace(told, laws={degrees: _scaled(law, factors[degrees]) for degrees, law in told.laws.items()})


def _scaled(law: StepLaw, factor: float) -> StepLaw:
    coefficients = tuple(factor * one for one in law.coefficients)
    return replace(law, coefficients=coefficients, overhead_s=factor * law.overhead_s)


def _factor(told: FleetProfile, degrees: Degrees, observed: Sequence[Observed], script: Script) -> float:
    law = told.laws[degrees]
    ratios = []
    for flow, config, clients in full_flows(degrees, observed):
        source = random.Random(clients)

        def draw(source: random.Random = source) -> tuple[int, int]:
            return source.randint(*script.prompts), source.randint(*script.outputs)

        limits = told.limits(replace(config, replicas=1))
        ratios.append(flow.seconds / (flow.drag * flow_token_s(law, config, limits, clients, draw)))
    return median(ratios) if ratios else 1.0


def full_flows(degrees: Degrees, observed: Sequence[Observed]) -> Iterator[tuple[Observed, ParallelConfig, int]]:
    """Flows that kept all stages at work, the replicas that they kept at work, and their clients."""
    stages, shards = degrees
    for one in observed:
        sequences = one.steps[-1].sequences
        if 0.0 < one.admitted < 1.0 and one.busy % stages == 0 and sequences >= _FULL:
            yield one, ParallelConfig(one.busy // stages, stages, shards, MAX_BATCH), round(sequences * one.busy)
