"""Plans as values: what to run in every state of the fleet, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data.canonical import canonical_json, checksum, exactly
from data.cluster import ClusterSpec, ClusterState
from data.errors import CorruptData, InvalidInput
from data.layout import ParallelConfig
from data.models import ModelSpec

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Objective:
    """What plans are chosen for: a request rate, the reference request, and a latency limit if any."""

    required_rps: float
    input_tokens: int
    output_tokens: int
    slo_s: float | None = None

    def __post_init__(self) -> None:
        if self.required_rps < 0 or self.input_tokens < 1 or self.output_tokens < 1:
            raise InvalidInput("an objective needs a rate of at least 0 and at least one token in and out")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Prediction for one configuration: latency of one request of the objective's reference shape,
    requests per second of the whole configuration, bytes that the fullest device needs.
    """

    latency_s: float
    throughput_rps: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration that was looked at; `dominated_by` names the one that beats it, if any."""

    config: ParallelConfig
    estimate: Estimate
    dominated_by: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run in `state`. `config` and `estimate` are None if the state cannot hold the model;
    `reason` says why this configuration, `fewer` what happens with one instance less.
    """

    state: ClusterState
    config: ParallelConfig | None
    estimate: Estimate | None
    reason: str
    frontier: tuple[Candidate, ...] = ()
    fewer: str = ""

    def __post_init__(self) -> None:
        if (self.config is None) != (self.estimate is None):
            raise InvalidInput(f"the plan for {self.state.key} needs both a configuration and its estimate, or neither")


@dataclass(frozen=True, slots=True)
class PlanBook:
    """The immutable map from every reachable cluster state to its plan, for one model and fleet.

    `policy` names how plans were chosen, `profile_sha256` the measurements they rest on.
    """

    model: ModelSpec
    cluster: ClusterSpec
    objective: Objective
    policy: str
    profile_sha256: str
    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        if len({plan.state for plan in self.plans}) != len(self.plans):
            raise InvalidInput("a plan book may hold one plan for each state only")
        for plan in self.plans:
            self.cluster.devices(plan.state)

    @property
    def sha256(self) -> str:
        """Checksum of the canonical body: equal books have equal checksums."""
        return checksum(self._body())

    def plan_for(self, state: ClusterState) -> Plan:
        """The plan of `state`, or of the listed state within it that has most devices.

        If there is none, a plan without a configuration whose reason says so.
        """
        within = [plan for plan in self.plans if _contains(state, plan.state)]
        if not within:
            return Plan(state, None, None, f"the plan book has no plan for {state.key} or a part of it")
        return max(within, key=lambda plan: (plan.state == state, self.cluster.devices(plan.state), plan.state.key))

    def to_bytes(self) -> bytes:
        """Canonical JSON; `from_bytes` inverts it."""
        return canonical_json({**self._body(), "sha256": self.sha256})

    @classmethod
    def from_bytes(cls, content: bytes) -> PlanBook:
        """Read a plan book. Raises `CorruptData` for anything but an intact book of this schema."""
        return _read_book(_checked_body(content))

    def _body(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model.to_json(),
            "cluster": self.cluster.to_json(),
            "objective": asdict(self.objective),
            "policy": self.policy,
            "profile_sha256": self.profile_sha256,
            "plans": [_plan_json(plan) for plan in self.plans],
        }


@dataclass(frozen=True, slots=True)
class PlanChange:
    """The plans that two books give for one state; None where a book does not list it."""

    state: ClusterState
    before: Plan | None
    after: Plan | None


def difference(before: PlanBook, after: PlanBook) -> tuple[PlanChange, ...]:
    """The states whose configuration differs between two books, smallest state first."""
    old, new = ({plan.state: plan for plan in book.plans} for book in (before, after))
    states = sorted(old.keys() | new.keys(), key=lambda state: (state.instances, state.key))
    changes = (PlanChange(state, old.get(state), new.get(state)) for state in states)
    return tuple(change for change in changes if _chosen(change.before) != _chosen(change.after))


def _chosen(plan: Plan | None) -> tuple[bool, ParallelConfig | None]:
    return plan is not None, plan.config if plan else None


def _contains(state: ClusterState, part: ClusterState) -> bool:
    counts = dict(state.counts)
    return all(count <= counts.get(name, 0) for name, count in part.counts)


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "state": plan.state.key,
        "config": plan.config.to_json() if plan.config else None,
        "estimate": asdict(plan.estimate) if plan.estimate else None,
        "reason": plan.reason,
        "frontier": [
            {"config": one.config.to_json(), "estimate": asdict(one.estimate), "dominated_by": one.dominated_by}
            for one in plan.frontier
        ],
        "fewer": plan.fewer,
    }


def _checked_body(content: bytes) -> Mapping[str, Any]:
    """The body under an intact checksum. The version is looked at first: a newer one may differ in all else."""
    try:
        document = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptData("the plan book is not JSON; publish it again") from error
    if not isinstance(document, dict):
        raise CorruptData("the plan book is not a JSON mapping; publish it again")
    version = document.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise CorruptData("the plan book has no schema version; publish it again")
    if version > SCHEMA_VERSION:
        raise CorruptData(
            f"the plan book has schema {version} and was made by a newer version; upgrade or republish "
            f"(this version reads up to {SCHEMA_VERSION})"
        )
    body = {name: value for name, value in document.items() if name != "sha256"}
    try:
        intact = document.get("sha256") == checksum(body)
    except ValueError:
        intact = False
    if not intact:
        raise CorruptData("the plan book's checksum is wrong: it was changed or damaged; publish it again")
    return body


def _read_book(body: Mapping[str, Any]) -> PlanBook:
    fields = exactly(body, ("schema_version", *PlanBook.__dataclass_fields__), "the plan book")
    try:
        return PlanBook(
            model=ModelSpec.from_json(fields["model"]),
            cluster=ClusterSpec.from_json(fields["cluster"]),
            objective=Objective(**exactly(fields["objective"], Objective.__dataclass_fields__, "the objective")),
            policy=str(fields["policy"]),
            profile_sha256=str(fields["profile_sha256"]),
            plans=tuple(_read_plan(plan) for plan in fields["plans"]),
        )
    except (InvalidInput, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(f"the plan book cannot be read ({error}); publish it again") from error


def _read_plan(value: Any) -> Plan:
    fields = exactly(value, Plan.__dataclass_fields__, "a plan")
    state = ClusterState.from_key(str(fields["state"]))
    config = ParallelConfig.from_json(fields["config"]) if fields["config"] is not None else None
    estimate = _read_estimate(fields["estimate"]) if fields["estimate"] is not None else None
    frontier = tuple(_read_candidate(one) for one in fields["frontier"])
    return Plan(state, config, estimate, str(fields["reason"]), frontier, str(fields["fewer"]))


def _read_candidate(value: Any) -> Candidate:
    fields = exactly(value, Candidate.__dataclass_fields__, "a candidate")
    config = ParallelConfig.from_json(fields["config"])
    return Candidate(config, _read_estimate(fields["estimate"]), str(fields["dominated_by"]))


def _read_estimate(value: Any) -> Estimate:
    return Estimate(**exactly(value, Estimate.__dataclass_fields__, "an estimate"))
