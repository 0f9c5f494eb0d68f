"""Plan books of several models that share a fleet: for every cluster state the groups to run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data.canonical import checksum, exactly, sealed, unsealed
from data.cluster import ClusterSpec, ClusterState
from data.deployment import Deployment, SharedGroup
from data.errors import CorruptData, InvalidInput
from data.models import ModelSpec

KIND = "shared"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, order=True)
class Speed:
    """How quick a model is, alone in a shape: seconds per token of prefill, and for a decode step of a full batch."""

    model: str
    stages: int
    shards: int
    prefill_token_s: float
    step_s: float

    def __post_init__(self) -> None:
        if min(self.prefill_token_s, self.step_s) < 0:
            raise InvalidInput(f"a speed of {self.model!r} is negative; give seconds")


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """What to run in `state`: None if it cannot hold anything; `reason` says why this."""

    state: ClusterState
    deployment: Deployment | None
    reason: str


@dataclass(frozen=True, slots=True)
class SharedPlanBook:
    """The immutable map from every reachable cluster state to its groups. Models are known by their specs' names.

    `speeds` has one for every model and shape that some plan uses, or none at all.
    """

    models: tuple[ModelSpec, ...]
    cluster: ClusterSpec
    policy: str
    plans: tuple[SharedPlan, ...]
    speeds: tuple[Speed, ...] = ()

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.models]
        if not all(names) or len(set(names)) != len(names):
            raise InvalidInput("every model of a plan book needs a name of its own")
        if len({plan.state for plan in self.plans}) != len(self.plans):
            raise InvalidInput("a plan book may hold one plan for each state only")
        for plan in self.plans:
            self._check(plan, {spec.name: spec for spec in self.models})
        self._check_speeds()

    def _check(self, plan: SharedPlan, specs: Mapping[str, ModelSpec]) -> None:
        devices = self.cluster.devices(plan.state)
        if plan.deployment is None:
            return
        if plan.deployment.devices > devices:
            raise InvalidInput(
                f"the plan for {plan.state.key} takes {plan.deployment.devices} devices of {devices}; leave groups out"
            )
        for group in plan.deployment.groups:
            for hosted in group.hosted:
                if hosted.model not in specs:
                    known = ", ".join(specs)
                    raise InvalidInput(f"{plan.state.key} hosts {hosted.model!r}, which is none of the models {known}")
                group.config(hosted).stage_layers(0, specs[hosted.model].layers)

    def _check_speeds(self) -> None:
        known = {(one.model, one.stages, one.shards) for one in self.speeds}
        used = {
            (hosted.model, group.stages, group.shards)
            for plan in self.plans
            if plan.deployment is not None
            for group in plan.deployment.groups
            for hosted in group.hosted
        }
        if known and (missing := sorted(used - known)):
            model, stages, shards = missing[0]
            raise InvalidInput(f"no speed is given for {model!r} at P{stages}·T{shards}; give all speeds, or none")

    @property
    def sha256(self) -> str:
        """Checksum of the canonical body: equal books have equal checksums."""
        return checksum(self._body())

    def plan_for(self, state: ClusterState) -> SharedPlan:
        """The plan of `state`, or of the listed state within it that has most devices.

        If there is none, a plan without groups whose reason says so.
        """
        within = [plan for plan in self.plans if state.contains(plan.state)]
        if not within:
            return SharedPlan(state, None, f"the plan book has no plan for {state.key} or a part of it")
        return max(within, key=lambda plan: (plan.state == state, self.cluster.devices(plan.state), plan.state.key))

    def to_bytes(self) -> bytes:
        """Canonical JSON; `from_bytes` inverts it."""
        return sealed(self._body())

    @classmethod
    def from_bytes(cls, content: bytes) -> SharedPlanBook:
        """Read a book. Raises `CorruptData` for anything but an intact book of this kind and schema."""
        if not is_shared(content):
            raise CorruptData(f"this is no plan book of several models (kind {KIND!r}); publish it again")
        return _read(unsealed(content, SCHEMA_VERSION, "the plan book"))

    def _body(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "models": [spec.to_json() for spec in self.models],
            "cluster": self.cluster.to_json(),
            "policy": self.policy,
            "plans": [
                {
                    "state": plan.state.key,
                    "groups": [group.to_json() for group in plan.deployment.groups] if plan.deployment else None,
                    "reason": plan.reason,
                }
                for plan in self.plans
            ],
            "speeds": [asdict(speed) for speed in self.speeds],
        }


def is_shared(content: bytes) -> bool:
    """Whether these bytes are meant to be a plan book of several models."""
    try:
        document = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("kind") == KIND


def _read(body: Mapping[str, Any]) -> SharedPlanBook:
    fields = exactly(body, ("kind", "schema_version", *SharedPlanBook.__dataclass_fields__), "the plan book")
    try:
        return SharedPlanBook(
            models=tuple(ModelSpec.from_json(spec) for spec in fields["models"]),
            cluster=ClusterSpec.from_json(fields["cluster"]),
            policy=str(fields["policy"]),
            plans=tuple(_read_plan(plan) for plan in fields["plans"]),
            speeds=tuple(Speed(**exactly(one, Speed.__dataclass_fields__, "a speed")) for one in fields["speeds"]),
        )
    except (InvalidInput, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(f"the plan book cannot be read ({error}); publish it again") from error


def _read_plan(value: Any) -> SharedPlan:
    fields = exactly(value, ("state", "groups", "reason"), "a plan")
    groups = fields["groups"]
    deployment = Deployment(tuple(SharedGroup.from_json(group) for group in groups)) if groups is not None else None
    return SharedPlan(ClusterState.from_key(str(fields["state"])), deployment, str(fields["reason"]))
