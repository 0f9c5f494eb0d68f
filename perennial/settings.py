"""The settings of a project directory: one typed object, read from `PERENNIAL_*` variables."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from data.errors import CorruptData, InvalidInput
from serving.settings import Capacity, EngineSettings, ServingSettings, Timeouts

_Section = TypeVar("_Section", Timeouts, Capacity, EngineSettings)


class Settings(BaseSettings):
    """Where state lives, and what to override in the serving tier.

    Every field is an environment variable with the prefix `PERENNIAL_`; the three sections take
    JSON, such as `PERENNIAL_TIMEOUTS='{"lease_s": 10}'`, with the names of `serving.settings`.
    """

    model_config = SettingsConfigDict(env_prefix="PERENNIAL_", extra="forbid", frozen=True)

    home: Path = Path(".perennial")
    debug: bool = False
    address: str = ""  # of a running service; empty: the one that `perennial serve` started in this home
    registry: str = ""  # MLflow tracking URI; empty: SQLite in this home
    timeouts: dict[str, float] = Field(default_factory=dict)
    capacity: dict[str, Any] = Field(default_factory=dict)
    engine: dict[str, Any] = Field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        """Checkpoints made here."""
        return self.home / "checkpoints"

    @property
    def profiles(self) -> Path:
        """Measured profiles."""
        return self.home / "profiles"

    @property
    def plans(self) -> Path:
        """Plan books made here."""
        return self.home / "plans"

    @property
    def service(self) -> Path:
        """Everything of the service that runs in this home: journal, ready file, logs."""
        return self.home / "service"

    @property
    def ready_file(self) -> Path:
        """Where the controller writes its addresses."""
        return self.service / "ready.json"

    @property
    def token_file(self) -> Path:
        """The join token of agents; readable by its owner only."""
        return self.home / "join-token"

    @property
    def registry_uri(self) -> str:
        """MLflow tracking and registry URI."""
        return self.registry or f"sqlite:///{(self.home / 'mlflow.db').absolute()}"

    def join_token(self) -> str:
        """The token in `token_file`, made (mode 0600) when there is none."""
        self.home.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return read_token(self.token_file)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(token := secrets.token_urlsafe(24))
        return token

    def serving(self, *, engine: EngineSettings | None = None, **fields: Any) -> ServingSettings:
        """The serving tier's settings for this home; `fields` are those of `ServingSettings`.

        Overrides from the environment win over `engine`. Raises `InvalidInput` for an unknown name.
        """
        self.service.mkdir(parents=True, exist_ok=True)
        defaults: dict[str, Any] = {
            "journal": str((self.service / "journal.sqlite").absolute()),
            "ready_file": str(self.ready_file.absolute()),
            "token": self.join_token() if "token" not in fields else "",
        }
        return ServingSettings(
            **{**defaults, **fields},
            timeouts=_override(Timeouts(), self.timeouts, "PERENNIAL_TIMEOUTS"),
            capacity=_override(Capacity(), self.capacity, "PERENNIAL_CAPACITY"),
            engine=_override(engine or EngineSettings(), self.engine, "PERENNIAL_ENGINE"),
        )


def read_token(path: Path) -> str:
    """The join token in a file. Raises `InvalidInput` if it cannot be read, `CorruptData` if it is empty."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read a join token from {path}: {error}") from error
    if not token:
        raise CorruptData(f"{path} is empty; put a join token there, or delete it in a home: a new one will be made")
    return token


def _override(section: _Section, values: dict[str, Any], variable: str) -> _Section:
    known = type(section).__struct_fields__
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise InvalidInput(f"{variable} has no setting {unknown[0]}; it has {', '.join(known)}")
    merged = {**msgspec.structs.asdict(section), **values}
    try:
        return msgspec.convert(merged, type=type(section))
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{variable} is not valid: {error}") from error


def load_settings() -> Settings:
    """Settings from the environment. Raises `InvalidInput` naming the variable that is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"PERENNIAL_{first['loc'][0]}".upper()
        raise InvalidInput(f"{name} is not valid: {first['msg']}; unset it or correct it") from error
    except ValueError as error:
        raise InvalidInput(f"a PERENNIAL_ variable is not valid: {error}; unset it or correct it") from error
