"""MLflow's tracking server: the one that is configured, or SQLite and files under our home."""

from __future__ import annotations

import logging
from pathlib import Path

from serving.controller.plans import quiet_mlflow

quiet_mlflow()

from mlflow.tracking import MlflowClient  # noqa: E402  after its settings


class Tracking:
    """A client for the server at `uri`; `artifacts` is where one of our own keeps its files."""

    def __init__(self, uri: str, artifacts: Path | None = None) -> None:
        self.uri = uri
        self._artifacts = artifacts
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        for name in ("mlflow", "alembic"):  # they announce every migration of a fresh database
            logging.getLogger(name).setLevel(logging.WARNING)
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)

    def experiment_id(self, name: str) -> str:
        """The experiment of this name, made if there is none."""
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = self._artifacts.absolute().as_uri() if self._artifacts else None
        return str(self.client.create_experiment(name, artifact_location=location))


def place(home: str, uri: str = "") -> tuple[str, Path]:
    """The server's URI, by default SQLite in `home`, and the folder of a local one's files."""
    root = Path(home).absolute()
    return uri or f"sqlite:///{root / 'mlflow.db'}", root / "mlflow-artifacts"
