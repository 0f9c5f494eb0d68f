"""The offline half of the demo: checkpoint, profile, plan book, registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from data.errors import InvalidInput
from data.plan import PlanBook
from data.profile import Profile
from perennial.demo.setting import Setting
from perennial.settings import Settings
from profiling.campaign import Progress

Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the service is started with: a plan book file, or the champion of a registered plan."""

    checkpoint: Path
    book: PlanBook
    plan_file: Path | None
    registry_model: str
    version: str
    error: dict[str, float]
    measured: str


def checkpoint(setting: Setting, settings: Settings) -> Path:
    """The demo's checkpoint: made on the first run, the same bytes every time."""
    from serving.engine.checkpoint import create_checkpoint

    path = settings.checkpoints / setting.name
    if not path.exists():
        create_checkpoint(str(path), seed=0, **setting.model)
    return path


def planned(setting: Setting, settings: Settings, path: Path, report: Report) -> Prepared:
    """Profile, search and publish: through the flows, or without them where Prefect or MLflow is missing."""
    if find_spec("prefect") is None or find_spec("mlflow") is None:
        return _planned_here(setting, settings, path, report)
    from flows.local import run_plan
    from flows.plan import PlanRequest
    from flows.profile import ProfileRequest

    home = str(settings.home)
    measure = ProfileRequest(
        checkpoint=str(path),
        home=home,
        device=setting.device,
        dtype=setting.dtype,
        numerics=setting.numerics,
        budget_s=setting.budget_s,
        max_shards=setting.instances,
    )
    request = PlanRequest(
        cluster=setting.cluster.to_json(),
        measure=measure,
        home=home,
        registry=settings.registry_uri,
        required_rps=setting.shape.rate_rps,
        input_tokens=sum(setting.shape.prompt_tokens) // 2,
        output_tokens=sum(setting.shape.output_tokens) // 2,
        tokens_per_request=setting.tokens_per_request,
        arrival_cv=setting.shape.cv,
    )
    result = run_plan(request, on_progress=report)
    book = PlanBook.from_bytes(Path(result["book"]).read_bytes())
    profile = Profile.read(result["profile"])
    return Prepared(path, book, None, result["name"], result["version"], result["cost_model_error"], _measured(profile))


def given(path: Path, plan_file: Path) -> Prepared:
    """A plan book that was made elsewhere."""
    if not plan_file.is_file():
        raise InvalidInput(f"there is no plan book {plan_file}; make one with `perennial plan`")
    book = PlanBook.from_bytes(plan_file.read_bytes())
    return Prepared(path, book, plan_file, "", "", {}, f"elsewhere, profile {book.profile_sha256[:12]}")


def _planned_here(setting: Setting, settings: Settings, path: Path, report: Report) -> Prepared:
    from data.plan import Objective
    from planning.book import build_book
    from planning.costs import CostModel, holdout_error
    from profiling.measurement import measure

    profile = measure(
        str(path),
        engine=setting.engine,
        max_shards=setting.instances,
        budget_s=setting.budget_s,
        on_progress=report,
    )
    profile.write(settings.profiles / profile.sha256[:16])
    objective = Objective(
        setting.shape.rate_rps, sum(setting.shape.prompt_tokens) // 2, sum(setting.shape.output_tokens) // 2
    )
    book = build_book(
        profile.model,
        setting.cluster,
        CostModel.fit(profile),
        objective,
        profile_sha256=profile.sha256,
        tokens_per_request=setting.tokens_per_request,
        arrival_cv=setting.shape.cv,
    )
    settings.plans.mkdir(parents=True, exist_ok=True)
    file = settings.plans / f"{book.sha256[:16]}.json"
    file.write_bytes(book.to_bytes())
    median, p90 = holdout_error(profile)
    return Prepared(path, book, file, "", "", {"median": median, "p90": p90}, _measured(profile))


def _measured(profile: Profile) -> str:
    return f"{profile.steps.num_rows} step times, {profile.links.num_rows} link times"
