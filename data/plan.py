"""Plans as values: what to run in every state of the fleet, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data.canonical import checksum, exactly, sealed, unsealed
from data.cluster import ClusterSpec, ClusterState
from data.errors import CorruptData, InvalidInput
from data.explanation import Candidate, Estimate, Loss, Move, read_estimate
from data.layout import ParallelConfig
from data.models import ModelSpec

SCHEMA_VERSION = 2
# What version 1 did not have yet, and what it meant.
_NEW_BOOK_FIELDS: Mapping[str, Any] = {"assumptions": "", "moves": []}
_NEW_PLAN_FIELDS: Mapping[str, Any] = {"transitions": []}
_NEW_ESTIMATE_FIELDS: Mapping[str, Any] = {"price_usd_h": 0.0, "residency": "shard"}


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
class Plan:
    """What to run in `state`. `config` is for when nothing runs, or what the book does not know; `transitions`
    are pairs of a configuration in force and what is run then, wherever that is not `config`.

    `config` and `estimate` are None if the state cannot hold the model. `frontier` is what was chosen
    from, `reason` says why, `fewer` what happens with one instance less. What is chosen once is not left
    again in the same state. Raises `InvalidInput` for a plan that goes round, or to what it did not look at.
    """

    state: ClusterState
    config: ParallelConfig | None
    estimate: Estimate | None
    reason: str
    frontier: tuple[Candidate, ...] = ()
    fewer: str = ""
    transitions: tuple[tuple[ParallelConfig, ParallelConfig], ...] = ()

    def __post_init__(self) -> None:
        if (self.config is None) != (self.estimate is None):
            raise InvalidInput(f"the plan for {self.state.key} needs both a configuration and its estimate, or neither")
        known = {candidate.config for candidate in self.frontier}
        then = dict(self.transitions)
        for chosen in {*then.values(), *((self.config,) if then else ())}:
            if chosen is None or then.get(chosen, self.config) != chosen:
                raise InvalidInput(f"the plan for {self.state.key} does not stay with {chosen} once it runs")
            if chosen not in known:
                raise InvalidInput(f"the plan for {self.state.key} goes to {chosen}, which its frontier lacks")

    def given(self, now: ParallelConfig | None) -> Plan:
        """This plan as it is while `now` is in force: its choice and its estimate."""
        then = dict(self.transitions).get(now, self.config) if now else self.config
        if then == self.config:
            return self
        estimate = next(candidate.estimate for candidate in self.frontier if candidate.config == then)
        reason = f"{then} from {now}: in the long run the way to {self.config} costs more than it saves"
        return replace(self, config=then, estimate=estimate, reason=reason, fewer="", transitions=())

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_json` inverts it."""
        return {
            "state": self.state.key,
            "config": self.config.to_json() if self.config else None,
            "estimate": asdict(self.estimate) if self.estimate else None,
            "reason": self.reason,
            "frontier": [candidate.to_json() for candidate in self.frontier],
            "fewer": self.fewer,
            "transitions": [[now.key, then.key] for now, then in self.transitions],
        }

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """Inverse of `to_json`. Raises `CorruptData`, `InvalidInput`, `TypeError` or `ValueError`."""
        fields = exactly(value, cls.__dataclass_fields__, "a plan")
        return cls(
            state=ClusterState.from_key(str(fields["state"])),
            config=ParallelConfig.from_json(fields["config"]) if fields["config"] is not None else None,
            estimate=read_estimate(fields["estimate"]) if fields["estimate"] is not None else None,
            reason=str(fields["reason"]),
            frontier=tuple(Candidate.from_json(one) for one in fields["frontier"]),
            fewer=str(fields["fewer"]),
            transitions=tuple(
                (ParallelConfig.from_key(now), ParallelConfig.from_key(then)) for now, then in fields["transitions"]
            ),
        )


@dataclass(frozen=True, slots=True)
class PlanBook:
    """The immutable map from every reachable cluster state and what runs there to a plan, for one model and fleet.

    `policy` names how plans were chosen, `assumptions` what it took for granted about the fleet,
    `profile_sha256` the measurements they rest on; `moves` are what the changes between the
    configurations of the book take.
    """

    model: ModelSpec
    cluster: ClusterSpec
    objective: Objective
    policy: str
    profile_sha256: str
    plans: tuple[Plan, ...]
    assumptions: str = ""
    moves: tuple[Move, ...] = ()
    _index: _Index = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len({plan.state for plan in self.plans}) != len(self.plans):
            raise InvalidInput("a plan book may hold one plan for each state only")
        object.__setattr__(self, "_index", _Index.of(self))

    @property
    def sha256(self) -> str:
        """Checksum of the canonical body: equal books have equal checksums."""
        return checksum(self._body())

    @property
    def title(self) -> str:
        """What the book is for: its model's name."""
        return self.model.name

    def plan_for(self, state: ClusterState, now: ParallelConfig | None = None) -> Plan:
        """The plan of `state`, or of the listed state within it that has most devices, while `now` is in force.

        If there is none, a plan without a configuration whose reason says so. Choosing again with what was
        chosen changes nothing: `plan_for(state, plan_for(state, now).config)` has the same configuration.
        """
        plan = self._index.within(state)
        if plan is None:
            return Plan(state, None, None, f"the plan book has no plan for {state.key} or a part of it")
        return plan.given(now)

    def move(self, now: ParallelConfig, then: ParallelConfig) -> Move | None:
        """What going from one configuration to another takes; None where the book does not say."""
        return self._index.moves.get((now, then))

    def losses(self, plan: Plan) -> tuple[Loss, ...]:
        """What the loss of one instance of each type leads to while `plan` runs."""
        return tuple(self._loss(plan, name) for name, _ in plan.state.counts)

    def to_bytes(self) -> bytes:
        """Canonical JSON; `from_bytes` inverts it."""
        return sealed(self._body())

    @classmethod
    def from_bytes(cls, content: bytes) -> PlanBook:
        """Read a plan book of this schema or an older one. Raises `CorruptData` for anything but an intact book."""
        return _read_book(_upgraded(unsealed(content, SCHEMA_VERSION, "the plan book")))

    def _loss(self, plan: Plan, name: str) -> Loss:
        counts = dict(plan.state.counts)
        state = ClusterState.of({**counts, name: counts[name] - 1})
        then = self.plan_for(state, plan.config)
        move = self.move(plan.config, then.config) if plan.config and then.config else None
        return Loss(name, state, then.config, then.estimate, move)

    def _body(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model.to_json(),
            "cluster": self.cluster.to_json(),
            "objective": asdict(self.objective),
            "policy": self.policy,
            "profile_sha256": self.profile_sha256,
            "plans": [plan.to_json() for plan in self.plans],
            "assumptions": self.assumptions,
            "moves": [move.to_json() for move in self.moves],
        }


@dataclass(frozen=True, slots=True)
class _Index:
    """What makes looking up quick: no lookup in a complete book looks at more than one plan."""

    plans: Mapping[ClusterState, Plan]
    largest: tuple[Plan, ...]  # most devices first
    most: Mapping[str, int]  # instances of each type in any plan
    moves: Mapping[tuple[ParallelConfig, ParallelConfig], Move]

    @classmethod
    def of(cls, book: PlanBook) -> _Index:
        """Raises `InvalidInput` for a state that the book's fleet cannot have."""
        ordered = sorted(book.plans, key=lambda plan: (book.cluster.devices(plan.state), plan.state.key), reverse=True)
        most: dict[str, int] = {}
        for plan in ordered:
            for name, count in plan.state.counts:
                most[name] = max(count, most.get(name, 0))
        moves = {(move.now, move.then): move for move in book.moves}
        return cls({plan.state: plan for plan in ordered}, tuple(ordered), most, moves)

    def within(self, state: ClusterState) -> Plan | None:
        """The plan of the largest listed part of `state`: that of its greatest conceivable part, where it is listed."""
        greatest = ClusterState.of({name: min(count, self.most.get(name, 0)) for name, count in state.counts})
        listed = self.plans.get(greatest)
        return listed or next((plan for plan in self.largest if state.contains(plan.state)), None)


def stated_sha256(content: bytes) -> str:
    """The checksum that stands in the document of a book, which is not that of the book if its schema is older."""
    return str(json.loads(content)["sha256"])


def _upgraded(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same book in the present schema."""
    if body["schema_version"] == SCHEMA_VERSION:
        return body
    try:
        plans = [_upgraded_plan(plan) for plan in body["plans"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptData(f"the plan book's plans cannot be read ({error!r}); publish it again") from error
    return {**body, **_NEW_BOOK_FIELDS, "plans": plans}


def _upgraded_plan(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    estimate = {**plan["estimate"], **_NEW_ESTIMATE_FIELDS} if plan["estimate"] is not None else None
    frontier = [{**one, "estimate": {**one["estimate"], **_NEW_ESTIMATE_FIELDS}} for one in plan["frontier"]]
    return {**plan, **_NEW_PLAN_FIELDS, "estimate": estimate, "frontier": frontier}


def _read_book(body: Mapping[str, Any]) -> PlanBook:
    written = [name for name, one in PlanBook.__dataclass_fields__.items() if one.init]
    fields = exactly(body, ("schema_version", *written), "the plan book")
    try:
        return PlanBook(
            model=ModelSpec.from_json(fields["model"]),
            cluster=ClusterSpec.from_json(fields["cluster"]),
            objective=Objective(**exactly(fields["objective"], Objective.__dataclass_fields__, "the objective")),
            policy=str(fields["policy"]),
            profile_sha256=str(fields["profile_sha256"]),
            plans=tuple(Plan.from_json(plan) for plan in fields["plans"]),
            assumptions=str(fields["assumptions"]),
            moves=tuple(Move.from_json(move) for move in fields["moves"]),
        )
    except (InvalidInput, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(f"the plan book cannot be read ({error}); publish it again") from error
