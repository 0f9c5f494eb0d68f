"""What has to be known of a fleet to simulate it: step laws, limits, and what changes take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from data.errors import InvalidInput
from data.layout import ParallelConfig
from planning.simulation.batching import BatchLimits
from planning.step_laws import StepLaw

Degrees = tuple[int, int]  # stages, shards


@dataclass(frozen=True, slots=True)
class ChangeTimes:
    """One kind of change: seconds of preparation while serving, by how much steps take longer meanwhile, and
    seconds from the last step of the old replicas to the first of the new.
    """

    prepare_s: float
    slowdown: float
    transfer_s: float


@dataclass(frozen=True, slots=True)
class Charges:
    """What a fleet that changes is charged, as measured.

    A new instance joins after `start_s`, in which steps take `start_slowdown` times as long; a dead one is noticed
    after `detect_s`; a change begins `settle_s` after its cause, and `retry_s` later after one that failed.
    """

    planned: ChangeTimes
    recovery: ChangeTimes
    start_s: float
    start_slowdown: float
    detect_s: float
    settle_s: float = 0.05
    retry_s: float = 0.2


@dataclass(frozen=True, slots=True)
class FleetProfile:
    """The law and the KV blocks of replicas by their degrees, what steps and blocks hold, and the charges."""

    laws: Mapping[Degrees, StepLaw]
    kv_blocks: Mapping[Degrees, int]
    charges: Charges
    step_tokens: int
    block_tokens: int

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
