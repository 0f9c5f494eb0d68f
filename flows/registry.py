"""Plan books in the MLflow registry: one registered model per (LLMs, cluster), one immutable book per version."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time

from pyarrow import parquet

from data.books import Book, PlanChange, difference
from data.errors import InvalidInput
from data.profile import Profile
from flows.book_page import BookPage, book_tags, page_of
from flows.summary import FitError
from flows.tracking import Tracking, place
from serving.controller.plans import SHA256_TAG, RegistryReader, quiet_mlflow
from serving.errors import NotFound

quiet_mlflow()

import mlflow  # noqa: E402  after its settings
from mlflow.entities import Metric, Param, RunStatus, RunTag  # noqa: E402
from mlflow.entities.model_registry import ModelVersion  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

CHAMPION, CHALLENGER, LAST_GOOD = "champion", "challenger", "last-good"
ALIASES = (CHAMPION, CHALLENGER, LAST_GOOD)
EXPERIMENT = "perennial-plans"

_PREFIX = "plan."
_PARAM_CHARACTERS = 6000


@dataclass(frozen=True, slots=True)
class Release:
    """A plan book with everything that is published beside it.

    `profile` is that of the only model, `error` that of the cost model (of several, the worst). `settings` become the
    run's parameters, `tags` its tags (and the version's).
    """

    book: Book
    profile: Profile | None = None
    error: FitError | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The registered model's name, such as `plan.llama-3-8b.h200x4-spot`."""
        return plan_name(self.book.title, self.book.cluster.name)

    def all_tags(self) -> dict[str, str]:
        """`tags` and those that follow from the book."""
        tags = {SHA256_TAG: self.book.sha256, **book_tags(self.book)}
        if self.profile is not None:
            tags["hardware_sha256"] = self.profile.fingerprint.sha256
            tags["hardware"] = self.profile.fingerprint.device
        if self.error is not None:
            tags["cost_model_error_median"] = f"{self.error.median:.4f}"
            tags["cost_model_error_p90"] = f"{self.error.p90:.4f}"
        return {**tags, **self.tags}


@dataclass(frozen=True, slots=True)
class LoggedPlan:
    """A run and the model it logged; not yet a version."""

    run_id: str
    model_id: str


@dataclass(frozen=True, slots=True)
class PlanVersion:
    """A registered version as `perennial plans list` shows it; `created_s` is Unix time."""

    name: str
    version: str
    aliases: tuple[str, ...]
    created_s: float
    sha256: str
    tags: Mapping[str, str]


def plan_name(model: str, cluster: str) -> str:
    """`plan.<model>.<cluster>` in lower case, anything but letters, digits, dots and dashes made a dash."""
    parts = (re.sub(r"[^a-z0-9.-]+", "-", part.lower()).strip("-.") or "unnamed" for part in (model, cluster))
    return _PREFIX + ".".join(parts)


def open_registry(home: str, uri: str = "") -> Registry:
    """The registry at `uri`, or the one on SQLite in `home`."""
    return Registry(*place(home, uri))


class Registry:
    """The registry at `uri`; `artifacts` is where a local one keeps its files (a server has its own place)."""

    def __init__(self, uri: str, artifacts: Path | None = None) -> None:
        self.uri = uri
        self._tracking = Tracking(uri, artifacts)
        self._client = self._tracking.client
        self._reader = RegistryReader(uri)

    def log(self, release: Release) -> LoggedPlan:
        """Write the run page and the model, and return both. A failure leaves a deleted run."""
        run = self._client.create_run(self._tracking.experiment_id(EXPERIMENT), run_name=release.name)
        run_id = run.info.run_id
        try:
            page = page_of(release.book, release.profile, release.error)
            self._log_run_page(run_id, release, page)
            model_id = self._log_model(run_id, release, page)
        except BaseException:
            self._client.delete_run(run_id)
            raise
        self._client.set_terminated(run_id, RunStatus.to_string(RunStatus.FINISHED))
        return LoggedPlan(run_id, model_id)

    def discard(self, logged: LoggedPlan) -> None:
        """Undo `log`."""
        self._client.delete_logged_model(logged.model_id)
        self._client.delete_run(logged.run_id)

    def ensure(self, name: str) -> bool:
        """Make the registered model if there is none; whether it was made."""
        try:
            self._client.get_registered_model(name)
        except MlflowException:
            self._client.create_registered_model(name, description="Perennial plan books; one version is one book.")
            return True
        return False

    def remove(self, name: str) -> None:
        """Undo `ensure` when it made the model."""
        self._client.delete_registered_model(name)

    def register(self, name: str, logged: LoggedPlan, tags: Mapping[str, str]) -> str:
        """Make the logged model the next version of `name`; returns its number."""
        self._make_global()
        version = self._client.create_model_version(
            name, source=f"models:/{logged.model_id}", run_id=logged.run_id, model_id=logged.model_id, tags=dict(tags)
        )
        return str(version.version)

    def unregister(self, name: str, logged: LoggedPlan) -> None:
        """Undo `register`, also one that failed after the version had been made."""
        for version in self._client.search_model_versions(f"name='{name}'"):
            if version.run_id == logged.run_id:
                self._client.delete_model_version(name, version.version)

    def aliases(self, name: str) -> dict[str, str]:
        """Alias → version of a plan. Raises `NotFound`."""
        try:
            return {alias: str(version) for alias, version in self._client.get_registered_model(name).aliases.items()}
        except MlflowException as error:
            raise NotFound(f"the registry has no plan {name}; see `perennial plans list`") from error

    def set_aliases(self, name: str, aliases: Mapping[str, str]) -> None:
        """Make the aliases of `name` just these; the champion moves last."""
        old = self.aliases(name)
        for alias in sorted(old.keys() - aliases.keys()):
            self._client.delete_registered_model_alias(name, alias)
        for alias in sorted(aliases, key=lambda alias: alias == CHAMPION):
            if old.get(alias) != aliases[alias]:
                self._client.set_registered_model_alias(name, alias, aliases[alias])

    def promote(self, name: str, version: str, alias: str = CHAMPION) -> str:
        """Point `alias` at a version (number or alias); a new champion makes the old one last-good.

        Returns the version. Raises `NotFound`, `InvalidInput` for an alias that has no meaning here.
        """
        if alias not in ALIASES:
            raise InvalidInput(f"{alias!r} is not an alias of plans; use one of {', '.join(ALIASES)}")
        number = str(self._reader.resolve(name, version).version)
        aliases = self.aliases(name)
        previous = aliases.get(CHAMPION)
        if alias == CHAMPION and previous not in (None, number):
            aliases[LAST_GOOD] = previous
        self.set_aliases(name, {**aliases, alias: number})
        return number

    def rollback(self, name: str) -> str:
        """Swap champion and last-good; returns the new champion. Raises `NotFound` if there is no last-good."""
        aliases = self.aliases(name)
        if CHAMPION not in aliases or LAST_GOOD not in aliases:
            raise NotFound(f"{name} has no earlier champion to go back to; promote a version first")
        swapped = {CHAMPION: aliases[LAST_GOOD], LAST_GOOD: aliases[CHAMPION]}
        self.set_aliases(name, {**aliases, **swapped})
        return swapped[CHAMPION]

    def list_plans(self, name: str | None = None) -> list[PlanVersion]:
        """Every version of one plan, or of all, newest first within a name."""
        known = sorted(model.name for model in self._client.search_registered_models())
        wanted = [each for each in known if each.startswith(_PREFIX) and name in (None, each)]
        return [version for each in wanted for version in self._versions(each)]

    def load_plan(self, name: str, version: str = CHAMPION) -> Book:
        """The book of a version number or alias: reads `plan.json` only and executes nothing.

        Raises `NotFound`, `CorruptData`, `PlanMismatch`, `Unavailable`.
        """
        return self._reader.fetch(self._reader.resolve(name, version))

    def diff(self, name: str, before: str, after: str) -> tuple[PlanChange, ...]:
        """The states in which two versions (numbers or aliases) choose differently."""
        return difference(self.load_plan(name, before), self.load_plan(name, after))

    def _versions(self, name: str) -> Iterator[PlanVersion]:
        aliases = self.aliases(name)
        found = self._client.search_model_versions(f"name='{name}'")
        for version in sorted(found, key=lambda version: -int(version.version)):
            yield _plan_version(version, tuple(sorted(a for a, v in aliases.items() if v == str(version.version))))

    def _make_global(self) -> None:
        """Part of MLflow looks at the process's URIs only, even below a client that was given others."""
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)

    def _log_run_page(self, run_id: str, release: Release, page: BookPage) -> None:
        now_ms = int(time() * 1000)
        metrics = [Metric(key, value, now_ms, step) for key, value, step in page.metrics]
        if release.error is not None:
            metrics.append(Metric("cost_model_error_median", release.error.median, now_ms, 0))
            metrics.append(Metric("cost_model_error_p90", release.error.p90, now_ms, 0))
        params = [Param(key, value[:_PARAM_CHARACTERS]) for key, value in sorted(release.settings.items())]
        tags = [RunTag(key, value) for key, value in release.all_tags().items()]
        self._client.log_batch(run_id, metrics=metrics, params=params, tags=tags)
        for name, figure in page.pictures.items():
            self._client.log_figure(run_id, figure, name)

    def _log_model(self, run_id: str, release: Release, page: BookPage) -> str:
        self._make_global()
        run = partial(mlflow.start_run, run_id=run_id, log_system_metrics=False)
        with TemporaryDirectory(prefix="perennial-plan-") as folder, run():
            info = mlflow.pyfunc.log_model(
                name=release.name.replace(".", "-"),
                python_model=str(Path(__file__).with_name("plan_model.py")),
                artifacts=_write_artifacts(Path(folder), release, page),
                pip_requirements=[f"mlflow=={mlflow.__version__}"],
                tags=release.all_tags(),
            )
        return str(info.model_id)


def _plan_version(version: ModelVersion, aliases: tuple[str, ...]) -> PlanVersion:
    created_s = version.creation_timestamp / 1000
    tags = dict(version.tags)
    return PlanVersion(version.name, str(version.version), aliases, created_s, tags.get(SHA256_TAG, ""), tags)


def _write_artifacts(folder: Path, release: Release, page: BookPage) -> dict[str, str]:
    """The files of the model. They must be within it: a registered version does not see the run's files."""
    (folder / "plan.json").write_bytes(release.book.to_bytes())
    (folder / "report.md").write_text(page.report, encoding="utf-8")
    for name, table in page.tables.items():
        parquet.write_table(table, folder / f"{name}.parquet")
    (folder / "plots").mkdir()
    for name, figure in page.pictures.items():
        figure.savefig(folder / "plots" / name)
    if release.profile is not None:
        release.profile.write(folder / "profile")
    return {entry.stem: str(entry) for entry in folder.iterdir()}
