"""The public test harness: a real service on this machine, and everything that can happen to it.

    async with fleet(checkpoint, instances=4) as service:
        stream = asyncio.create_task(collect(service.client(), request))
        await service.notice("i0", seconds=2.0)   # a warning, and kill -9 at the deadline
        await service.kill("i1")                  # kill -9 without a warning
        await service.add(2)
        assert not compare(reference_streams(checkpoint, [request])["r0"], await stream)

Instances are process groups, so what happens to them is what happens to machines: SIGKILL, SIGSTOP, a
closed connection. When the block ends, every process must be gone; otherwise `Leftovers` is raised.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from data.cluster import ClusterSpec, ClusterState, InstanceType
from data.explanation import Estimate
from data.layout import ParallelConfig
from data.models import ModelSpec
from data.plan import Objective, Plan, PlanBook
from data.shared_plan import SharedPlanBook
from perennial.comparison import Difference, agreement, compare, indexed
from perennial.fleet import Fleet, Instance, StartFailed, with_ports
from perennial.models import given_groups
from perennial.processes import Start, start_command
from perennial.reference import reference_streams
from serving.api.client import Client
from serving.engine.weights import read_spec
from serving.errors import PerennialError
from serving.requests import GenerationRequest
from serving.settings import ServingSettings

__all__ = [
    "LADDER",
    "Difference",
    "Fleet",
    "Instance",
    "Leftovers",
    "StartFailed",
    "agreement",
    "collect",
    "compare",
    "fleet",
    "given_groups",
    "given_plans",
    "indexed",
    "reference_streams",
]

LADDER: Mapping[int, str] = {1: "1x1x1", 2: "1x1x2", 3: "1x3x1", 4: "1x2x2"}
"""Replicas × stages × shards by number of devices; each step changes both stages and shards somewhere."""


class Leftovers(PerennialError):
    """Processes of a fleet that outlived it."""


@asynccontextmanager
async def fleet(
    checkpoint: str | Path | Mapping[str, str | Path],
    *,
    instances: int = 4,
    devices_per_instance: int = 1,
    plan: PlanBook | SharedPlanBook | str | Path | None = None,
    home: str | Path | None = None,
    instance_type: str = "local-cpu",
    start_timeout_s: float = 120.0,
    gpus: Sequence[int] = (),
    start: Start = start_command,
    **settings: Any,
) -> AsyncIterator[Fleet]:
    """A service over `instances` instances, ready when the block begins and gone when it has ended.

    `checkpoint` is one folder, or several by the names of their models, which then need a plan of `given_groups`.
    `plan` is a plan book or its file; None runs `LADDER`, or what the `registry` among the settings says.
    `home` keeps settings, journal and logs (a temporary directory by default); `gpus` are shared by all
    instances, which otherwise have their own. `start` starts the processes (`perennial.nursery` has a quick
    way). Further `settings` are
    fields of `ServingSettings`, such as `timeouts`, `capacity` and `engine`. Raises `StartFailed`, and
    `Leftovers` at the end.
    """
    with ExitStack() as stack:
        folder = str(home or stack.enter_context(tempfile.TemporaryDirectory(prefix="perennial-")))
        configuration = _configuration(checkpoint, folder, plan, devices_per_instance, settings)
        service = Fleet(
            with_ports(configuration),
            home=folder,
            instance_type=instance_type,
            devices_per_instance=devices_per_instance,
            gpus=gpus,
            start=start,
        )
        try:
            await service.start(instances, timeout_s=start_timeout_s)
            yield service
        finally:
            left = await service.close()
        if left:
            raise Leftovers(f"these processes outlived the fleet: {'; '.join(left)}")


def given_plans(
    spec: ModelSpec,
    configs: Mapping[int, str],
    *,
    devices_per_instance: int = 1,
    max_batch: int = 8,
    instance_type: str = "local-cpu",
) -> PlanBook:
    """A plan book that was not searched but told: `replicas x stages x shards` by number of instances.

    Estimates are zero, for nothing was measured. States without an entry run nothing.
    """
    kind = InstanceType(instance_type, devices_per_instance, "cpu", 1 << 30, 1e9, 1e10, 0.0, 0.0)
    most = max(configs)
    plans = []
    for count in range(most + 1):
        state = ClusterState.of({instance_type: count})
        if count not in configs:
            plans.append(Plan(state, None, None, "no configuration was given for this state"))
            continue
        replicas, stages, shards = (int(degree) for degree in configs[count].split("x"))
        config = ParallelConfig(replicas, stages, shards, max_batch)
        plans.append(Plan(state, config, Estimate(0.0, 0.0, 0), "given"))
    return PlanBook(spec, ClusterSpec("given", (kind,), (most,)), Objective(0.0, 1, 1), "given", "", tuple(plans))


async def collect(client: Client, request: GenerationRequest) -> list[tuple[int, int]]:
    """Run a request to its end and return `(output position, token)` as delivered, for `compare`."""
    chunks = client.stream(
        request.prompt,
        request_id=request.request_id,
        sampling=request.sampling,
        limits=request.limits,
        deadline_s=request.deadline_s,
        resumable=request.resumable,
        detokenize=request.detokenize,
        model=request.model,
    )
    async with aclosing(chunks):
        return [pair async for chunk in chunks for pair in indexed([chunk])]


def _configuration(
    checkpoint: str | Path | Mapping[str, str | Path],
    home: str,
    plan: PlanBook | SharedPlanBook | str | Path | None,
    devices: int,
    settings: dict[str, Any],
) -> ServingSettings:
    folder = Path(home).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(checkpoint, Mapping):
        models: dict[str, Any] = {"checkpoints": {name: str(Path(one).absolute()) for name, one in checkpoint.items()}}
    else:
        models = {"checkpoint": str(Path(checkpoint).absolute())}
        if plan is None and "registry" not in settings:
            plan = given_plans(read_spec(str(checkpoint)), LADDER, devices_per_instance=devices)
    defaults = {
        **models,
        "journal": str(folder / "journal.sqlite"),
        "ready_file": str(folder / "ready.json"),
        "token": secrets.token_urlsafe(16),
        "plan": _plan_file(plan, folder) if plan else "",
    }
    return ServingSettings(**{**defaults, **settings})


def _plan_file(book: PlanBook | SharedPlanBook | str | Path, folder: Path) -> str:
    if not isinstance(book, PlanBook | SharedPlanBook):
        return str(Path(book).absolute())
    path = folder / "plan.json"
    path.write_bytes(book.to_bytes())
    return str(path)
