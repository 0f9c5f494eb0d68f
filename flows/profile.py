"""The flow `profile`: measure a model on this machine's devices, once for each combination that matters."""

# No postponed annotations: Prefect evaluates a flow's parameters where this module's names are unknown.

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from prefect import flow, get_client, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.sync import concurrency
from prefect.context import TaskRunContext
from prefect.tasks import Task
from pydantic import BaseModel

from data.canonical import checksum
from data.errors import CorruptData, InvalidInput
from data.fingerprint import Fingerprint
from data.models import ModelSpec
from data.profile import SCHEMA_VERSION, Profile
from flows.progress import reporter
from profiling.fingerprint import take_fingerprint
from profiling.grid import Grid
from profiling.measurement import default_grid, measure
from serving.engine.weights import read_spec
from serving.settings import EngineSettings

_SLOT_TIMEOUT_S = 600.0


class ProfileRequest(BaseModel):
    """What to measure: a checkpoint on the devices here. `max_shards` 0 means as many as there are devices."""

    checkpoint: str
    home: str = ".perennial"
    device: str = "cpu"
    dtype: str = "float32"
    numerics: str = "auto"
    threads: int = 1
    max_shards: int = 0
    budget_s: float = 12.0

    @property
    def engine(self) -> EngineSettings:
        """The engine settings that steps are measured with."""
        return EngineSettings(device=self.device, dtype=self.dtype, numerics=self.numerics, threads=self.threads)


def profile_key(spec: ModelSpec, fingerprint: Fingerprint, grid: Grid, budget_s: float) -> str:
    """What a measurement is known by: model, devices and libraries (in the fingerprint), and points."""
    parts = (SCHEMA_VERSION, spec.to_json(), fingerprint.to_json(), msgspec.to_builtins(grid), budget_s)
    return checksum(msgspec.to_builtins(parts))


@flow(name="profile")
def profile(request: ProfileRequest) -> str:
    """Measure what is asked for, or find it measured already; returns the folder of the profile."""
    spec = read_spec(request.checkpoint)
    engine = request.engine
    grid = default_grid(spec, engine.device, request.max_shards)
    fingerprint = take_fingerprint(
        device=engine.device, dtype=engine.dtype, numerics=engine.numerics, threads=engine.threads
    )
    key = profile_key(spec, fingerprint, grid, request.budget_s)
    folder = str((Path(request.home) / "profiles" / key[:16]).absolute())
    measured = measure_profile(key, folder, request)
    if not _readable(measured):
        measured = measure_profile.with_options(refresh_cache=True)(key, folder, request)
    return measured


def _cache_key(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    return f"profile-{parameters['key']}"


def _worth_retrying(_: Task[..., Any], __: TaskRun, state: State[Any]) -> bool:
    """A process may die of something passing; a request that makes no sense stays so."""
    return not isinstance(state.result(raise_on_failure=False), InvalidInput)


@task(
    name="measure profile",
    cache_key_fn=_cache_key,
    persist_result=True,
    result_serializer="json",
    retries=1,
    retry_delay_seconds=1,
    retry_condition_fn=_worth_retrying,
)
def measure_profile(key: str, folder: str, request: ProfileRequest) -> str:
    """Measure into `folder`, alone on the device; returns the folder."""
    with _device_slot(request.device):
        measured = measure(
            request.checkpoint,
            engine=request.engine,
            max_shards=request.max_shards,
            budget_s=request.budget_s,
            on_progress=reporter("profile-progress"),
        )
    measured.write(folder)
    return folder


@contextmanager
def _device_slot(device: str) -> Iterator[None]:
    """Two profiles at once on one machine would measure each other."""
    name = f"profile-{socket.gethostname()}-{device}"
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(name, limit=1)
    with concurrency(name, occupy=1, timeout_seconds=_SLOT_TIMEOUT_S, strict=True):
        yield


def _readable(folder: str) -> bool:
    """A cached result is the name of a folder, which may have been deleted since."""
    try:
        Profile.read(folder)
    except CorruptData:
        return False
    return True
