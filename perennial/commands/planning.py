"""`perennial profile` and `perennial plan`: from a checkpoint to a plan book in the registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from data.errors import CorruptData, InvalidInput
from perennial.commands.plan_runs import bar, run_fleet, run_model

if TYPE_CHECKING:
    from pydantic import BaseModel

    from data.cluster import ClusterSpec
    from data.profile import Profile
    from profiling.campaign import Progress as Step
    from serving.settings import EngineSettings

Request = TypeVar("Request", bound="BaseModel")

Checkpoint = Annotated[str, typer.Argument(help="Folder of a Hugging Face checkpoint.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; empty: the device's usual one.")]
Numerics = Annotated[str, typer.Option(help="exact, native, or auto: exact on cpu, native on cuda.")]
Shards = Annotated[int, typer.Option(help="Largest tensor-parallel degree to measure; 0: as many as devices.")]
Budget = Annotated[float, typer.Option("--budget", help="Seconds to spend on step times.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(profile)
    app.command()(plan)
    app.command("plan-groups")(plan_groups)


def plan_groups(
    groups: Annotated[Path, typer.Argument(help="JSON: which models share which groups, by number of instances.")],
    checkpoint: Annotated[list[str], typer.Option(help="NAME=FOLDER of every model; repeated.")],
    out: Annotated[Path, typer.Option(help="Where the plan book goes.")],
) -> None:
    """Write a plan book for several models that share a fleet, from groups that are told."""
    from perennial.models import checkpoint_fields, read_groups

    named = checkpoint_fields(checkpoint).get("checkpoints")
    if named is None:
        raise InvalidInput("every checkpoint needs a name here: --checkpoint NAME=FOLDER")
    book = read_groups(groups, named)
    out.write_bytes(book.to_bytes())
    for plan in book.plans:
        Console().print(f"{plan.state.key}: {plan.deployment}", markup=False)


def profile(
    checkpoint: Checkpoint,
    device: Device = "cpu",
    dtype: Dtype = "",
    numerics: Numerics = "auto",
    max_shards: Shards = 0,
    budget_s: Budget = 12.0,
    out: Annotated[Path | None, typer.Option(help="Write the profile here too.")] = None,
) -> None:
    """Measure step and link times of a checkpoint's model on this machine's devices."""
    from planning.costs import holdout_error
    from serving.settings import EngineSettings, usual_dtype

    engine = EngineSettings(device=device, dtype=dtype or usual_dtype(device), numerics=numerics)
    with bar() as report:
        measured, folder = _measure(checkpoint, engine, max_shards, budget_s, out, report)
    if out is not None and folder != out:
        measured.write(out)
    median, p90 = holdout_error(measured)
    console = Console()
    console.print(f"{measured.steps.num_rows} step times and {measured.links.num_rows} link times in {out or folder}")
    console.print(f"cost model error on held-out points: median {median:.1%}, P90 {p90:.1%}")


def plan(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint to measure; not needed with --profile.")] = "",
    profile: Annotated[str, typer.Option(help="Folder of a profile that was measured before.")] = "",
    fleet: Annotated[Path | None, typer.Option(help="Several models: a JSON file of models, SLOs and fleet.")] = None,
    search_s: Annotated[float, typer.Option("--budget-s", min=0.0, help="With --fleet: seconds to search.")] = 10.0,
    recent: Annotated[
        Path | None, typer.Option(help="With --fleet: compare the champion with these requests (CSV or journal).")
    ] = None,
    cluster: Annotated[Path | None, typer.Option(help="JSON file of the fleet (name, types, most).")] = None,
    type: Annotated[str, typer.Option(help="Instance type from the catalog.")] = "local-cpu",  # noqa: A002
    instances: Annotated[int, typer.Option(help="At most this many instances.")] = 4,
    memory_mb: Annotated[float, typer.Option("--memory-mb", help="Memory of one device; 0: the type's.")] = 0.0,
    rate: Annotated[float, typer.Option(help="Requests per second to sustain.")] = 1.0,
    input_tokens: Annotated[int, typer.Option(help="Prompt of the reference request.")] = 64,
    output_tokens: Annotated[int, typer.Option(help="Output of the reference request.")] = 64,
    slo: Annotated[float | None, typer.Option(help="Latency limit in seconds.")] = None,
    policy: Annotated[str, typer.Option(help="perennial, journey, hysteresis or spotserve.")] = "perennial",
    availability: Annotated[str, typer.Option(help="For journey: a trace of instances to fit.")] = "",
    select: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE to choose from a table of many traces, as nodes=16-node."),
    ] = None,
    charge: Annotated[
        list[str] | None,
        typer.Option(help="For journey: NAME=VALUE of what changes take, e.g. cut_s=0.5; see planning.charges."),
    ] = None,
    waiting_usd_h: Annotated[float, typer.Option(help="For journey: what an hour of waiting is worth.")] = 20.0,
    max_batch: Annotated[int, typer.Option(help="Most requests a replica runs at once.")] = 8,
    device: Device = "cpu",
    dtype: Dtype = "",
    numerics: Numerics = "auto",
    max_shards: Shards = 0,
    budget_s: Budget = 12.0,
    promote: Annotated[bool, typer.Option(help="Make the new version champion.")] = True,
    serve: Annotated[bool, typer.Option("--serve", help="Keep planning on a schedule.")] = False,
    every: Annotated[float, typer.Option(help="With --serve: seconds between runs.")] = 3600.0,
    cron: Annotated[str, typer.Option(help="With --serve: a cron expression instead.")] = "",
) -> None:
    """Search a configuration for every cluster state, or groups for several models, and publish the plan book."""
    require("prefect", "mlflow")
    if (fleet is None) == (not checkpoint and not profile) or (recent is not None and fleet is None):
        raise InvalidInput("name a checkpoint, a --profile or a --fleet file; --recent goes with --fleet")
    from flows.fleet_file import FleetFile
    from flows.fleet_steps import FleetRequest
    from flows.plan import PlanRequest
    from perennial.settings import load_settings
    from serving.settings import usual_dtype

    settings = load_settings()
    engine = {"device": device, "dtype": dtype or usual_dtype(device), "numerics": numerics, "max_shards": max_shards}
    where = {"home": str(settings.home.absolute()), "registry": settings.registry_uri}  # scheduled runs start elsewhere
    if fleet is not None:
        FleetFile.read(fleet)  # a mistake in it is said before Prefect has started
        run_fleet(
            valid(
                FleetRequest,
                **where,
                **engine,
                fleet=str(fleet.absolute()),
                recent=str(recent.absolute()) if recent else "",
                budget_s=search_s,
                most_batch=max_batch,
                measure_s=budget_s,
                promote=promote,
            ),
            (cron, every) if serve else None,
        )
        return
    measure = {"checkpoint": str(Path(checkpoint).absolute()), "home": where["home"], "budget_s": budget_s, **engine}
    request = valid(
        PlanRequest,
        **where,
        cluster=_cluster(cluster, type, instances, memory_mb).to_json(),
        profile=str(Path(profile).absolute()) if profile else "",
        measure=measure if checkpoint else None,
        required_rps=rate,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        slo_s=slo,
        policy=policy,
        availability=str(Path(availability).absolute()) if availability else "",
        select=pairs(select),
        charges=pairs(charge),
        waiting_usd_h=waiting_usd_h,
        most_batch=max_batch,
        promote=promote,
    )
    run_model(request, (cron, every) if serve else None)


def _measure(
    checkpoint: str,
    engine: EngineSettings,
    max_shards: int,
    budget_s: float,
    out: Path | None,
    report: Callable[[Step], None],
) -> tuple[Profile, Path]:
    """Through the flow where Prefect is installed, which finds earlier results; directly where it is not."""
    from data.profile import Profile
    from perennial.settings import load_settings

    settings = load_settings()
    if find_spec("prefect") is not None:
        from flows.local import run_profile
        from flows.profile import ProfileRequest

        request = ProfileRequest(
            checkpoint=checkpoint,
            home=str(settings.home.absolute()),
            device=engine.device,
            dtype=engine.dtype,
            numerics=engine.numerics,
            max_shards=max_shards,
            budget_s=budget_s,
        )
        folder = Path(run_profile(request, on_progress=report))
        return Profile.read(folder), folder
    from profiling.measurement import measure

    measured = measure(checkpoint, engine=engine, max_shards=max_shards, budget_s=budget_s, on_progress=report)
    folder = out or settings.profiles / measured.sha256[:16]
    measured.write(folder)
    return measured, folder


def valid(kind: type[Request], **fields: Any) -> Request:
    """A flow's request. Raises `InvalidInput` about the first field that is wrong."""
    from pydantic import ValidationError

    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"{first['loc'][0]}: {first['msg']}, not {first['input']!r}") from error


def pairs(fields: list[str] | None) -> dict[str, str]:
    """What KEY=VALUE options say. Raises `InvalidInput` for one without a key or a value."""
    found = {}
    for field in fields or ():
        key, equals, value = field.partition("=")
        if not (key and equals and value):
            raise InvalidInput(f"{field!r} does not name a key and its value; write KEY=VALUE")
        found[key] = value
    return found


def _cluster(path: Path | None, type_name: str, instances: int, memory_mb: float) -> ClusterSpec:
    from data.catalog import cluster_of
    from data.cluster import ClusterSpec

    if path is None:
        return cluster_of(type_name, instances, memory_mb)
    try:
        return ClusterSpec.from_json(json.loads(path.read_bytes()))
    except ValueError as error:
        raise CorruptData(f"{path} is not JSON; write name, types and most of the fleet") from error


def require(*modules: str) -> None:
    """Raises `InvalidInput` if one of the planning extra's modules is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InvalidInput(f"planning needs {', '.join(missing)}; install perennial[plan]")
