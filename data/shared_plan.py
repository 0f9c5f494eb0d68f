"""Plan books of several models that share a fleet: for every cluster state the groups to run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data.canonical import checksum, exactly, sealed, unsealed
from data.cluster import ClusterSpec, ClusterState
from data.demand import Demand
from data.deployment import Deployment, SharedGroup
from data.errors import CorruptData, InvalidInput
from data.models import ModelSpec

KIND = "shared"
SCHEMA_VERSION = 2
_LONGEST_TITLE = 100
# What version 1 did not have yet, and what it meant.
_NEW_BOOK_FIELDS: Mapping[str, Any] = {"demands": [], "occasion": ""}


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
class Forecast:
    """The share of requests that meet their SLO, simulated on the arrivals that were planned with.

    `bound` is what no placement exceeds, `by_model` the shares in the order of the book's models.
    """

    attainment: float
    bound: float
    by_model: tuple[float, ...]

    @property
    def gap(self) -> float:
        """How much a better placement could gain at most."""
        return max(0.0, self.bound - self.attainment)


@dataclass(frozen=True, slots=True)
class SharedPlan:
    """What to run in `state`: None if it cannot hold anything; `reason` says why this, `forecast` what it attains."""

    state: ClusterState
    deployment: Deployment | None
    reason: str
    forecast: Forecast | None = None


@dataclass(frozen=True, slots=True)
class SharedPlanBook:
    """The immutable map from every reachable cluster state to its groups. Models are known by their specs' names.

    `speeds` has one for every model and shape that some plan uses, or none at all. `demands` are what the plans were
    chosen for, one for every model in their order (none: the groups were told), and `occasion` says what called for
    this book, if that was a drift from another's demands.
    """

    models: tuple[ModelSpec, ...]
    cluster: ClusterSpec
    policy: str
    plans: tuple[SharedPlan, ...]
    speeds: tuple[Speed, ...] = ()
    demands: tuple[Demand, ...] = ()
    occasion: str = ""

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.models]
        if not all(names) or len(set(names)) != len(names):
            raise InvalidInput("every model of a plan book needs a name of its own")
        if len({plan.state for plan in self.plans}) != len(self.plans):
            raise InvalidInput("a plan book may hold one plan for each state only")
        for plan in self.plans:
            self._check(plan, {spec.name: spec for spec in self.models})
        self._check_speeds()
        if self.demands and [one.model for one in self.demands] != names:
            raise InvalidInput("a plan book has a demand for every one of its models, in their order, or none at all")

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

    @property
    def title(self) -> str:
        """What the book is for: its models' names."""
        return fleet_title([spec.name for spec in self.models])

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
        """Read a book of this schema or an older one. Raises `CorruptData` for anything but an intact book."""
        if not is_shared(content):
            raise CorruptData(f"this is no plan book of several models (kind {KIND!r}); publish it again")
        return _read(_upgraded(unsealed(content, SCHEMA_VERSION, "the plan book")))

    def _body(self) -> dict[str, Any]:
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "models": [spec.to_json() for spec in self.models],
            "cluster": self.cluster.to_json(),
            "policy": self.policy,
            "plans": [_plan_json(plan) for plan in self.plans],
            "speeds": [asdict(speed) for speed in self.speeds],
            "demands": [demand.to_json() for demand in self.demands],
            "occasion": self.occasion,
        }


def fleet_title(models: Iterable[str]) -> str:
    """What a fleet of these models is called: their names, or their number and a checksum where that would be long."""
    names = sorted(models)
    title = "+".join(names)
    return title if len(title) <= _LONGEST_TITLE else f"{len(names)}-models-{checksum(title)[:8]}"


def is_shared(content: bytes) -> bool:
    """Whether these bytes are meant to be a plan book of several models."""
    try:
        document = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("kind") == KIND


def _upgraded(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same book in the present schema."""
    if body["schema_version"] == SCHEMA_VERSION:
        return body
    try:
        plans = [{**plan, "forecast": None} for plan in body["plans"]]
    except (KeyError, TypeError) as error:
        raise CorruptData(f"the plan book's plans cannot be read ({error!r}); publish it again") from error
    return {**body, **_NEW_BOOK_FIELDS, "plans": plans}


def _plan_json(plan: SharedPlan) -> dict[str, Any]:
    forecast = plan.forecast
    return {
        "state": plan.state.key,
        "groups": [group.to_json() for group in plan.deployment.groups] if plan.deployment else None,
        "reason": plan.reason,
        "forecast": {**asdict(forecast), "by_model": list(forecast.by_model)} if forecast else None,
    }


def _read(body: Mapping[str, Any]) -> SharedPlanBook:
    fields = exactly(body, ("kind", "schema_version", *SharedPlanBook.__dataclass_fields__), "the plan book")
    try:
        return SharedPlanBook(
            models=tuple(ModelSpec.from_json(spec) for spec in fields["models"]),
            cluster=ClusterSpec.from_json(fields["cluster"]),
            policy=str(fields["policy"]),
            plans=tuple(_read_plan(plan) for plan in fields["plans"]),
            speeds=tuple(Speed(**exactly(one, Speed.__dataclass_fields__, "a speed")) for one in fields["speeds"]),
            demands=tuple(Demand.from_json(one) for one in fields["demands"]),
            occasion=str(fields["occasion"]),
        )
    except (InvalidInput, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(f"the plan book cannot be read ({error}); publish it again") from error


def _read_plan(value: Any) -> SharedPlan:
    fields = exactly(value, ("state", "groups", "reason", "forecast"), "a plan")
    groups, told = fields["groups"], fields["forecast"]
    deployment = Deployment(tuple(SharedGroup.from_json(group) for group in groups)) if groups is not None else None
    forecast = None
    if told is not None:
        told = exactly(told, Forecast.__dataclass_fields__, "a forecast")
        forecast = Forecast(float(told["attainment"]), float(told["bound"]), tuple(map(float, told["by_model"])))
    return SharedPlan(ClusterState.from_key(str(fields["state"])), deployment, str(fields["reason"]), forecast)
