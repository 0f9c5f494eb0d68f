"""What a plan explains itself with: predictions, what it was chosen from, and what a change or a loss costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from data.canonical import exactly
from data.cluster import ClusterState
from data.errors import InvalidInput
from data.layout import ParallelConfig

RESIDENCIES = ("shard", "model")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Prediction for one configuration: latency of one request of the objective's reference shape,
    requests per second of the whole configuration, bytes that the fullest device needs, and spot dollars
    per hour of the instances it occupies.

    `residency` is what a device has memory for beside its KV: the weights of its "shard", or of the whole "model".
    """

    latency_s: float
    throughput_rps: float
    memory_bytes: int
    price_usd_h: float = 0.0
    residency: str = "shard"

    def __post_init__(self) -> None:
        if self.residency not in RESIDENCIES:
            raise InvalidInput(f"residency {self.residency!r} is unknown; it is one of {', '.join(RESIDENCIES)}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration that was looked at; `dominated_by` names the one that beats it, if any."""

    config: ParallelConfig
    estimate: Estimate
    dominated_by: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_json` inverts it."""
        return {
            "config": self.config.to_json(),
            "estimate": asdict(self.estimate),
            "dominated_by": self.dominated_by,
        }

    @classmethod
    def from_json(cls, value: Any) -> Candidate:
        """Inverse of `to_json`. Raises `CorruptData` or `InvalidInput`."""
        fields = exactly(value, cls.__dataclass_fields__, "a candidate")
        config = ParallelConfig.from_json(fields["config"])
        return cls(config, read_estimate(fields["estimate"]), str(fields["dominated_by"]))


@dataclass(frozen=True, slots=True)
class Move:
    """What going from one configuration to another takes: bytes between instances, seconds of preparation while
    the old one serves, and seconds in which the requests of replicas that change stand still.
    """

    now: ParallelConfig
    then: ParallelConfig
    moved_bytes: int
    prepare_s: float
    pause_s: float

    def __str__(self) -> str:
        return f"{self.moved_bytes / 1e9:.3g} GB in {self.prepare_s:.3g} s, then {self.pause_s:.3g} s of pause"

    def to_json(self) -> list[Any]:
        """The fields in order, configurations by their keys; `from_json` inverts it."""
        return [self.now.key, self.then.key, self.moved_bytes, self.prepare_s, self.pause_s]

    @classmethod
    def from_json(cls, value: Any) -> Move:
        """Inverse of `to_json`. Raises `InvalidInput`, `TypeError` or `ValueError`."""
        now, then, moved_bytes, prepare_s, pause_s = value
        configs = ParallelConfig.from_key(now), ParallelConfig.from_key(then)
        return cls(*configs, int(moved_bytes), float(prepare_s), float(pause_s))


@dataclass(frozen=True, slots=True)
class Loss:
    """What follows if one instance of `type` goes: the state, what runs there, and what getting there takes.

    `config` is None where nothing can run; `move` is None where nothing changes or the book does not say.
    """

    type: str
    state: ClusterState
    config: ParallelConfig | None
    estimate: Estimate | None
    move: Move | None

    def words(self, before: ParallelConfig | None) -> str:
        """One phrase: what becomes of `before`."""
        if not self.state.instances:
            return f"one {self.type} less: nothing is left to serve on"
        if self.config is None or self.estimate is None:
            return f"one {self.type} less: the model no longer fits, streams wait for capacity"
        return (
            f"one {self.type} less: {'stays' if before == self.config else 'becomes'} {self.config}, "
            f"{self.estimate.latency_s:.3g} s per request, {self.estimate.throughput_rps:.3g} req/s"
            f"{f'; {self.move}' if self.move else ''}"
        )


def read_estimate(value: Any) -> Estimate:
    """Inverse of `asdict`. Raises `CorruptData` or `InvalidInput`."""
    return Estimate(**exactly(value, Estimate.__dataclass_fields__, "an estimate"))
