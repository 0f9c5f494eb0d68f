"""The fleet file: several models with their SLOs, what is known of their requests, and the fleet to place them on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.catalog import cluster_of
from data.cluster import ClusterSpec
from data.demand import Demand, History, read_history
from data.errors import CorruptData, InvalidInput
from data.placement import Arrivals
from planning.shared_book import told_arrivals
from serving.controller.history import is_journal, read_journal


class FleetModel(BaseModel):
    """A model: a checkpoint to measure or the folder of a profile, its SLO from admission to last token, and, where
    the fleet file names no history, its rate, the CV of its arrivals, and mean lengths.
    """

    model_config = ConfigDict(extra="forbid")

    slo_s: float
    checkpoint: str = ""
    profile: str = ""
    rate_rps: float = 0.0
    cv: float = 1.0
    input_tokens: float = 64
    output_tokens: float = 64


class FleetFile(BaseModel):
    """A fleet file as JSON. `cluster` is a `ClusterSpec`, or a `type` of the catalog with `instances` and, if it is
    another than the type's, `memory_mb`. `history` is a CSV file (see `data.demand.read_history`). Relative paths are
    relative to the file.
    """

    model_config = ConfigDict(extra="forbid")

    cluster: dict[str, Any]
    models: dict[str, FleetModel] = Field(min_length=1)
    history: str = ""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> FleetFile:
        """Read a file. Raises `InvalidInput` naming the first thing that is wrong."""
        try:
            read = cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise InvalidInput(f"cannot read the fleet file {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise InvalidInput(f"{path}: {where}: {first['msg']}; see the README for an example") from error
        read._resolve(Path(path).absolute().parent)
        for name, model in read.models.items():
            if bool(model.checkpoint) == bool(model.profile):
                raise InvalidInput(f"{path}: {name} needs either a checkpoint to measure or the folder of a profile")
        return read

    def spec(self) -> ClusterSpec:
        """The fleet. Raises `InvalidInput`."""
        if "types" in self.cluster:
            return ClusterSpec.from_json(self.cluster)
        try:
            return cluster_of(**self.cluster)
        except TypeError as error:
            raise InvalidInput("cluster takes type, instances and memory_mb, or a whole cluster spec") from error

    def demands(self) -> tuple[Demand, ...]:
        """What is asked of every model, as told. Raises `InvalidInput`."""
        fields = ("slo_s", "rate_rps", "cv", "input_tokens", "output_tokens")
        return tuple(Demand(name, *(getattr(one, field) for field in fields)) for name, one in self.models.items())

    def workload(self, seed: int) -> tuple[tuple[Demand, ...], Arrivals]:
        """Demands and arrivals: those of the history, or some drawn as told."""
        if not self.history:
            return self.demands(), told_arrivals(self.demands(), seed)
        history = read_history(self.history, list(self.models))
        return measured(self.demands(), history), history.arrivals

    def _resolve(self, folder: Path) -> None:
        for model in self.models.values():
            model.checkpoint, model.profile = (_within(folder, one) for one in (model.checkpoint, model.profile))
        self.history = _within(folder, self.history)


def measured(told: tuple[Demand, ...], history: History) -> tuple[Demand, ...]:
    """The demands with the rates, CVs and lengths of a history."""
    return tuple(history.measured(demand) for demand in told)


def recent_history(path: str, models: list[str]) -> History:
    """Requests of a CSV file, or of the journal of a service. Raises `InvalidInput` or `CorruptData`."""
    if not Path(path).is_file():
        raise InvalidInput(f"there is no file {path} with recent requests; name a CSV file or a service's journal")
    if not is_journal(path):
        return read_history(path, models)
    rows = read_journal(path)
    if not rows:
        raise CorruptData(f"{path} holds no requests yet; compare later")
    return History.of(models, rows)


def _within(folder: Path, path: str) -> str:
    return str(folder / path) if path else ""
