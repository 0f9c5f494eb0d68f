"""What planning for a fleet file goes through: profiles, the search, publishing; and what is asked and answered."""

# No postponed annotations: Prefect evaluates a flow's parameters where this module's names are unknown.

from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any, TypedDict

from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.context import TaskRunContext
from pydantic import BaseModel, Field

from data.canonical import checksum
from data.cluster import ClusterSpec
from data.demand import Demand
from data.placement import Arrivals
from data.profile import Profile
from data.shared_plan import SCHEMA_VERSION, SharedPlanBook
from flows.fleet_file import FleetFile, FleetModel
from flows.profile import ProfileRequest, profile
from flows.publish import Published
from flows.shared_summary import markdown
from flows.steps import assess_costs, publish_book, write_book
from flows.summary import FitError
from planning.costs import CostModel
from planning.hosting import Tenant
from planning.shared_book import SharedInputs, build_shared_book


class FleetRequest(BaseModel):
    """What to plan for: a fleet file, and how. `budget_s` is for the search, `measure_s` for each profile.

    `recent` names recent requests (CSV, or the journal of a service); with it the champion is compared with them.
    Otherwise the new version becomes champion with `promote`.
    """

    fleet: str
    recent: str = ""
    home: str = ".perennial"
    registry: str = ""
    budget_s: float = 10.0
    seed: int = 0
    most_batch: int = 8
    step_tokens: int = 256
    reserve_bytes: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    numerics: str = "auto"
    max_shards: int = 0
    measure_s: float = 12.0
    promote: bool = True
    tags: dict[str, str] = Field(default_factory=dict)

    def search_settings(self) -> dict[str, Any]:
        """What the search depends on besides the profiles and what is asked for."""
        return self.model_dump(include={"budget_s", "seed", "most_batch", "step_tokens", "reserve_bytes"})


class FleetResult(TypedDict):
    """The version that is in the registry, its file (empty if nothing was planned), the profiles' folders, the cost
    models' worst error, and what drifted, in words (None: not asked).
    """

    name: str
    version: str
    sha256: str
    aliases: list[str]
    book: str
    profiles: dict[str, str]
    cost_model_error: dict[str, float]
    drift: list[str] | None


@dataclass(frozen=True)
class Workload:
    """What is asked for, where it comes from, and what the search is to move away from."""

    demands: tuple[Demand, ...]
    arrivals: Arrivals
    incumbent: SharedPlanBook | None = None

    @property
    def sha256(self) -> str:
        """Checksum of all of it."""
        trace = sha256(self.arrivals.times_s.tobytes() + self.arrivals.models.tobytes()).hexdigest()
        before = self.incumbent.sha256 if self.incumbent else ""
        return checksum([[demand.to_json() for demand in self.demands], trace, before])


def profiles_of(file: FleetFile, request: FleetRequest) -> dict[str, str]:
    """The folder of every model's profile; measured, or found, where the file names a checkpoint."""
    return {name: model.profile or profile(_measurement(model, request)) for name, model in file.models.items()}


def _measurement(model: FleetModel, request: FleetRequest) -> ProfileRequest:
    return ProfileRequest(
        checkpoint=model.checkpoint,
        home=request.home,
        device=request.device,
        dtype=request.dtype,
        numerics=request.numerics,
        max_shards=request.max_shards,
        budget_s=request.measure_s,
    )


def worst_error(folders: dict[str, str]) -> FitError:
    """The largest errors of the models' cost models."""
    errors = [assess_costs(Profile.read(folder).sha256, folder) for folder in folders.values()]
    return FitError(*(max(values) for values in zip(*errors, strict=True)))


def searched(file: FleetFile, folders: dict[str, str], workload: Workload, request: FleetRequest) -> SharedPlanBook:
    """The book of what is searched, or was searched before. Raises `Infeasible`."""
    cluster = file.spec()
    key = checksum([SCHEMA_VERSION, _checksums(folders), cluster.to_json(), workload.sha256, request.search_settings()])
    inputs = inputs_of(folders, cluster, workload, request)
    content = search_placements(key, lambda: build_shared_book(inputs, monotonic))  # Prefect would look into values
    return SharedPlanBook.from_bytes(content.encode())


def _checksums(folders: dict[str, str]) -> dict[str, str]:
    return {name: Profile.read(folder).sha256 for name, folder in folders.items()}


def inputs_of(folders: dict[str, str], cluster: ClusterSpec, workload: Workload, request: FleetRequest) -> SharedInputs:
    """What the search is given."""
    costs = {name: CostModel.fit(Profile.read(one), step_tokens=request.step_tokens) for name, one in folders.items()}
    before = workload.incumbent.plans if workload.incumbent else ()
    return SharedInputs(
        tenants=[Tenant(demand, costs[demand.model], request.most_batch) for demand in workload.demands],
        cluster=cluster,
        arrivals=workload.arrivals,
        budget_s=request.budget_s,
        seed=request.seed,
        reserve_bytes=request.reserve_bytes,
        incumbent={plan.state: plan.deployment for plan in before if plan.deployment is not None},
    )


def _cache_key(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    return f"placements-{parameters['key']}"


@task(name="search placements", cache_key_fn=_cache_key, persist_result=True, result_serializer="json")
def search_placements(key: str, build: Callable[[], SharedPlanBook]) -> str:
    """The plan book of several models, as its canonical JSON; `key` says everything that it depends on."""
    return build().to_bytes().decode()


def publish_fleet(
    book: SharedPlanBook, error: FitError, folders: dict[str, str], request: FleetRequest, alias: str | None
) -> Published:  # fmt: skip
    """Publish under `alias` with a summary among the run's artifacts."""
    create_markdown_artifact(key="fleet-plan-summary", markdown=markdown(book, error))
    published = publish_book(
        book.to_bytes().decode(),
        error,
        {**request.search_settings(), "profiles": _checksums(folders)},
        request.tags,
        (request.home, request.registry),
        alias,
    )
    link = f"models:/{published.name}/{published.version}"
    create_link_artifact(key="fleet-plan-version", link=link, link_text=published.name)
    return published


def result_of(
    published: Published,
    book: SharedPlanBook | None,
    folders: dict[str, str],
    error: FitError,
    request: FleetRequest,
    drift: list[str] | None = None,
) -> FleetResult:
    """What the flow returns; without `book`, about a version that is there."""
    return {
        "name": published.name,
        "version": published.version,
        "sha256": published.sha256,
        "aliases": list(published.aliases),
        "book": str(write_book(book, Path(request.home) / "plans")) if book else "",
        "profiles": folders,
        "cost_model_error": asdict(error),
        "drift": drift,
    }
