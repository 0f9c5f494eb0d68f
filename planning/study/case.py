"""What is simulated: a model as every system runs it, a fleet over time, and requests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from data.availability import AvailabilityTrace
from data.cluster import InstanceType
from data.synthesis import gamma_gaps
from planning.mixing import Mixing
from planning.simulation.serving_perennial import Target
from planning.simulation.serving_spotserve import StaticFleet
from planning.spot_policy import Book
from planning.step_costs import StepCosts

Times = npt.NDArray[np.float64]

DISK_BYTES_PER_S = 1.5e9  # with it Reparallelization comes nearest to its published seconds


@dataclass(frozen=True, slots=True)
class Model:
    """One model: what the published system runs it with, and what ours does, from one profile.

    Instances are of the type `kind`. `pinned` is what a fleet of one shape runs where nothing is missing,
    and `hosts` the number of instances that Rerouting is configured for.
    """

    name: str
    kind: InstanceType
    fleet: StaticFleet
    costs: StepCosts
    rate_rps: float
    required_rps: float
    pinned: Target
    hosts: int

    @property
    def wanted(self) -> int:
        """Instances that `pinned` needs."""
        shape, replicas = self.pinned
        return replicas * shape.devices // self.costs.gpus


@dataclass(frozen=True, slots=True)
class Case:
    """One model on one trace with one arrival process.

    `book` is our policy for it, `mixing` the one that also decides how many instances to hold.
    """

    model: Model
    trace: AvailabilityTrace
    arrival_s: Times
    book: Book
    mixing: Mixing | None = None

    @property
    def spot_usd(self) -> float:
        """What the instances of the trace cost while they are there."""
        return self.trace.instance_minutes / 60 * self.model.kind.price_spot_usd_h

    def on_demand_usd(self, instance_s: float) -> float:
        """What so many instance-seconds cost on demand."""
        return instance_s / 3600 * self.model.kind.price_on_demand_usd_h


def loading(fleet: StaticFleet, costs: StepCosts) -> StaticFleet:
    """The fleet with the seconds that its weights take from disk: a role of the smallest shape on every instance."""
    smallest = min(costs.shapes(), key=lambda shape: shape.devices)
    role = float(costs.roles(smallest)[0].sum()) * costs.cell_bytes
    return replace(fleet, load_s=(role + costs.embedding_bytes * costs.gpus) / DISK_BYTES_PER_S)


def gamma_times(rate_rps: float, cv: float, seed: int, duration_s: float) -> Times:
    """Arrivals over `duration_s` whose gaps truly have that coefficient of variation."""
    count = int(2 * duration_s * rate_rps) + 50
    gaps = gamma_gaps(np.random.default_rng(seed), gaps=count, rate_rps=rate_rps, cv=cv, exact=False)
    return np.cumsum(gaps)
