"""What has to be known of a fleet to simulate it: step laws, limits, and what changes take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from data.errors import InvalidInput
from data.layout import ParallelConfig
from planning.simulation.batching import BatchLimits
from planning.step_laws import StepLaw

Array = npt.NDArray[np.float64]
Degrees = tuple[int, int]  # stages, shards


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds of a phase: `base_s`, and `device_s` for every device of a new replica."""

    base_s: float
    device_s: float = 0.0

    def of(self, devices: int) -> float:
        """With so many devices of new replicas."""
        return self.base_s + self.device_s * devices


def fit_duration(samples: Sequence[tuple[int, float]]) -> Duration:
    """From (devices of new replicas, seconds): the median where one number of devices was seen, else a line.

    The line is the one of least absolute error, so that a slow moment does not bend it.
    Raises `InvalidInput` without samples.
    """
    if not samples:
        raise InvalidInput("a duration needs samples; measure some changes first")
    devices, seconds = np.array(samples, dtype=np.float64).T
    if len(np.unique(devices)) == 1:
        return Duration(float(np.median(seconds)))

    def miss(line: Array) -> float:
        return float(np.abs(line[0] + line[1] * devices - seconds).sum())

    corners = (_through(devices, seconds, first, second) for first, second in combinations(range(len(samples)), 2))
    lines = [line for line in corners if line is not None and line.min() >= 0]
    best = min([*lines, np.array([float(np.median(seconds)), 0.0])], key=miss)
    return Duration(float(best[0]), float(best[1]))


def _through(devices: Array, seconds: Array, first: int, second: int) -> Array | None:
    """Base and slope of the line through two samples; None if it is vertical."""
    if devices[first] == devices[second]:
        return None
    slope = (seconds[second] - seconds[first]) / (devices[second] - devices[first])
    return np.array([seconds[first] - slope * devices[first], slope])


@dataclass(frozen=True, slots=True)
class Charges:
    """What a fleet that changes is charged, as measured.

    A new instance joins after `start_s`, in which steps take `start_slowdown` times as long; a dead one is noticed
    after `detect_s`; a change begins `settle_s` after its cause, and `retry_s` later after one that failed. It is
    prepared while old replicas serve, `slowdown` times as slow; from their last step to the first of the new ones
    it takes `transfer`.
    """

    prepare: Duration
    transfer: Duration
    slowdown: float
    start_s: float
    start_slowdown: float
    detect_s: float
    settle_s: float = 0.05
    retry_s: float = 0.2


@dataclass(frozen=True, slots=True)
class FleetProfile:
    """The law and the KV blocks of replicas by their degrees, what steps and blocks hold, and the charges.

    `processors`: how many all stages share; 0 if it does not matter that some stand still now and then.
    """

    laws: Mapping[Degrees, StepLaw]
    kv_blocks: Mapping[Degrees, int]
    charges: Charges
    step_tokens: int
    block_tokens: int
    processors: int = 0

    @property
    def overhead_s(self) -> float:
        """What a request spends outside of steps."""
        return sum(law.overhead_s for law in self.laws.values()) / len(self.laws)

    def law(self, config: ParallelConfig) -> StepLaw:
        """The law of a replica. Raises `InvalidInput` for degrees that were not measured."""
        degrees = config.stages, config.shards
        if degrees not in self.laws:
            raise InvalidInput(
                f"no steps of {config.stages} stages and {config.shards} shards were measured; measure them"
            )
        return self.laws[degrees]

    def limits(self, config: ParallelConfig) -> BatchLimits:
        """What a replica takes."""
        blocks = self.kv_blocks[config.stages, config.shards]
        return BatchLimits(config.max_batch, self.step_tokens, self.block_tokens, blocks, config.stages)
