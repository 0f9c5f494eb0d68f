"""Where plan books come from: a file, or a registry alias that is watched. Only `plan.json` is ever read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from data.books import Book, read_book
from data.errors import CorruptData, PerennialError
from data.models import ModelSpec
from data.plan import PlanBook, stated_sha256
from serving.errors import NotFound, PlanMismatch, Unavailable

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

PLAN_ARTIFACT = "artifacts/plan.json"  # within the registered model
SHA256_TAG = "plan_sha256"

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


_GEOMETRY = ("family", "layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")


def read_plan_file(path: str | os.PathLike[str]) -> Book:
    """Read a plan book, of one model or of several, from a file. Raises `CorruptData` unless it is an intact book."""
    return read_book(Path(path).read_bytes())


def check_book(book: Book, specs: Mapping[str, ModelSpec]) -> None:
    """Raise `PlanMismatch` if a book is for other models than those served; the only one is `specs[""]`."""
    planned = {"": book.model} if isinstance(book, PlanBook) else {spec.name: spec for spec in book.models}
    if planned.keys() != specs.keys():
        served, named = (", ".join(one.name for one in models.values()) for models in (specs, planned))
        raise PlanMismatch(f"the plan book is for {named}, and the service has {served}; plan again for these")
    for name, spec in specs.items():
        differing = [field for field in _GEOMETRY if getattr(planned[name], field) != getattr(spec, field)]
        if differing:
            raise PlanMismatch(
                f"the plan book is for {planned[name].name}, whose {differing[0]} differs from the checkpoint's; "
                "plan again"
            )


def quiet_mlflow() -> None:
    """No telemetry, progress bars or long retries, unless the environment says otherwise. Before MLflow's import."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


class RegistryReader:
    """Reads plan books from the MLflow registry at `uri`. Calls block: use a thread.

    MLflow is imported here, which takes about a second, so that only those pay who use a registry.
    Raises `PerennialError` if it is not installed.
    """

    def __init__(self, uri: str) -> None:
        quiet_mlflow()
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise PerennialError("a plan registry needs MLflow; install perennial[plan] or pass a plan file") from error
        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def resolve(self, name: str, version: str) -> ModelVersion:
        """The version that a number or an alias stands for. Raises `NotFound`, or `Unavailable` if unreachable."""
        from mlflow.exceptions import MlflowException

        try:
            if version.isdigit():
                return self.client.get_model_version(name, version)
            return self.client.get_model_version_by_alias(name, version)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise NotFound(f"the registry has no plan {name}@{version}; see `perennial plans list`") from error
            raise Unavailable(f"the registry {self.uri} does not answer: {error.message}") from error

    def fetch(self, version: ModelVersion) -> Book:
        """Download and read `plan.json` of a version, and nothing else.

        Raises `CorruptData` if it is damaged, `PlanMismatch` if another book was registered, `Unavailable`
        if it cannot be fetched.
        """
        where = f"plan {version.name} version {version.version}"
        content = self._download(version)
        try:
            book = read_book(content)
        except CorruptData as error:
            raise CorruptData(f"{where} cannot be read: {error}") from error
        stated = stated_sha256(content)
        if version.tags.get(SHA256_TAG, stated) != stated:
            raise PlanMismatch(f"{where} holds another book than was registered; publish it again")
        return book

    def _download(self, version: ModelVersion) -> bytes:
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        try:
            # Not a models:/ URI: MLflow looks those up in its global registry, whatever client is at hand.
            location = self.client.get_model_version_download_uri(version.name, version.version)
            with TemporaryDirectory(prefix="perennial-plan-") as folder:
                path = download_artifacts(f"{location}/{PLAN_ARTIFACT}", dst_path=folder, tracking_uri=self.uri)
                return Path(path).read_bytes()
        except MlflowException as error:
            raise Unavailable(f"plan.json of {version.name} version {version.version} cannot be fetched") from error


class PlanSource:
    """Watches one alias of one registered plan. Calls block: use a thread."""

    def __init__(self, uri: str, name: str, alias: str = "champion") -> None:
        self._reader = RegistryReader(uri)
        self._name, self._alias = name, alias
        self._seen: str | None = None

    def poll(self) -> tuple[Book, str] | None:
        """The book and version that the alias points to, if that is another version than last time.

        Raises what `RegistryReader` raises; a damaged version is reported once, then left alone
        until the alias moves on.
        """
        version = self._reader.resolve(self._name, self._alias)
        number = str(version.version)
        if number == self._seen:
            return None
        try:
            book = self._reader.fetch(version)
        except Unavailable:
            raise
        except PerennialError:
            self._seen = number
            raise
        self._seen = number
        return book, number
