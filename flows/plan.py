"""The flow `plan`: profile → cost model → configurations (of several models, groups) for every state → registry."""

# No postponed annotations: Prefect evaluates a flow's parameters where this module's names are unknown.

from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.context import TaskRunContext
from pydantic import BaseModel, Field

from data.availability import read_availability
from data.canonical import checksum
from data.cluster import ClusterSpec
from data.errors import InvalidInput
from data.plan import SCHEMA_VERSION, Objective, PlanBook
from data.profile import Profile
from flows.fleet_steps import FleetRequest, FleetResult
from flows.plan_fleet import plan_fleet
from flows.profile import ProfileRequest, profile
from flows.registry import CHAMPION
from flows.steps import assess_costs, publish_book, write_book
from flows.summary import FitError, frontier_rows, summary_markdown
from planning.availability_fit import fit
from planning.book import Policy, build_book
from planning.charges import charged
from planning.costs import CostModel
from planning.journey import Outlook


class PlanRequest(BaseModel):
    """What to plan for. `profile` is a folder; without one, `measure` says what to measure first.

    `cluster` is a `ClusterSpec` as JSON, `allowed` the (stages, shards) to choose from (None: all),
    `tokens_per_request` what KV space is sized for (None: the reference request). For the policy `journey`,
    `availability` is a file with a trace to fit how instances come and go (empty: `planning.journey.mild`), of a table
    of many the one that `select` names, `charges` what changes take beside bytes (`planning.charges`), and
    `waiting_usd_h` what an hour of a request's waiting is worth beside rent. With `promote` the new version
    becomes champion.
    """

    cluster: dict[str, Any]
    profile: str = ""
    measure: ProfileRequest | None = None
    home: str = ".perennial"
    registry: str = ""
    required_rps: float = 1.0
    input_tokens: int = 64
    output_tokens: int = 64
    slo_s: float | None = None
    policy: Policy = "perennial"
    availability: str = ""
    select: dict[str, str] = Field(default_factory=dict)
    charges: dict[str, float] = Field(default_factory=dict)
    waiting_usd_h: float = 20.0
    most_batch: int = 8
    allowed: list[tuple[int, int]] | None = None
    tokens_per_request: int | None = None
    arrival_cv: float = 1.0
    step_tokens: int = 256
    reserve_bytes: int = 0
    promote: bool = True
    tags: dict[str, str] = Field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        """What plans are chosen for."""
        return Objective(self.required_rps, self.input_tokens, self.output_tokens, self.slo_s)

    def search_settings(self) -> dict[str, Any]:
        """What the search depends on besides the profile."""
        return self.model_dump(exclude={"profile", "measure", "home", "registry", "promote", "tags"})


class PlanResult(TypedDict):
    """What `plan` returns: the registered version, the book's file, the profile's folder, and the fit's error."""

    name: str
    version: str
    sha256: str
    aliases: list[str]
    book: str
    profile: str
    cost_model_error: dict[str, float]


@flow(name="plan")
def plan(request: PlanRequest | FleetRequest) -> PlanResult | FleetResult:
    """Plan every state of the fleet, for one model or for several, publish the book, and promote it if asked."""
    return plan_fleet(request) if isinstance(request, FleetRequest) else plan_model(request)


def plan_model(request: PlanRequest) -> PlanResult:
    """Plan every state of a fleet for one model."""
    folder = request.profile or _measured(request)
    measured = Profile.read(folder)
    error = FitError(*assess_costs(measured.sha256, folder))
    content = search_plans(search_key(measured, request), folder, request)
    book = PlanBook.from_bytes(content.encode())
    _show(book, error)
    published = publish_book(
        content,
        error,
        request.search_settings(),
        request.tags,
        (request.home, request.registry),
        CHAMPION if request.promote else None,
        folder,
    )
    create_link_artifact(
        key="plan-version", link=f"models:/{published.name}/{published.version}", link_text=published.name
    )
    return {
        "name": published.name,
        "version": published.version,
        "sha256": published.sha256,
        "aliases": list(published.aliases),
        "book": str(write_book(book, Path(request.home) / "plans")),
        "profile": folder,
        "cost_model_error": asdict(error),
    }


def search_key(measured: Profile, request: PlanRequest) -> str:
    """What a search's result is known by: the measurements, the fleet, the objective, the settings, the trace."""
    return checksum([SCHEMA_VERSION, measured.sha256, request.search_settings(), _trace_sha256(request.availability)])


def build(measured: Profile, request: PlanRequest) -> PlanBook:
    """Fit the cost model and search every state of the fleet."""
    costs = CostModel.fit(measured, step_tokens=request.step_tokens, reserve_bytes=request.reserve_bytes)
    return build_book(
        measured.model,
        ClusterSpec.from_json(request.cluster),
        costs,
        request.objective,
        request.policy,
        profile_sha256=measured.sha256,
        most_batch=request.most_batch,
        allowed=request.allowed,
        tokens_per_request=request.tokens_per_request,
        arrival_cv=request.arrival_cv,
        outlook=outlook(request),
    )


def outlook(request: PlanRequest) -> Outlook:
    """What a journey counts on. Raises `InvalidInput` or `CorruptData` for a trace that says too little."""
    charges, traffic = charged(request.charges)
    if not request.availability:
        return Outlook(None, charges, traffic, request.waiting_usd_h)
    traces = read_availability(request.availability, **request.select)
    return Outlook(fit(list(traces.values())), charges, traffic, request.waiting_usd_h)


def _cache_key(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    return f"plan-{parameters['key']}"


@task(name="search plans", cache_key_fn=_cache_key, persist_result=True, result_serializer="json")
def search_plans(key: str, folder: str, request: PlanRequest) -> str:
    """The plan book for a request, as its canonical JSON."""
    return build(Profile.read(folder), request).to_bytes().decode()


def _trace_sha256(path: str) -> str:
    if not path:
        return ""
    try:
        return sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InvalidInput(f"the availability trace {path} cannot be read: {error.strerror}") from error


def _measured(request: PlanRequest) -> str:
    if request.measure is None:
        raise InvalidInput("a plan needs a profile folder, or a checkpoint to measure")
    return profile(request.measure)


def _show(book: PlanBook, error: FitError) -> None:
    create_table_artifact(key="plan-frontier", table=frontier_rows(book), description="Candidates of every state")
    create_markdown_artifact(key="plan-summary", markdown=summary_markdown(book, error))
