"""`perennial simulate`: policies side by side on a fleet that comes and goes, on this machine's CPU alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import cpu_count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from perennial.commands.planning import pairs, require, valid

if TYPE_CHECKING:
    from profiling.campaign import Progress as Step


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(simulate)


def simulate(
    availability: Annotated[
        list[str] | None, typer.Option(help="File of when instances come and go, in any format of data.availability.")
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE to choose from a table of many traces, as nodes=16-node."),
    ] = None,
    zones: Annotated[int, typer.Option(help="Zones of a synthetic fleet; losses are correlated within one.")] = 1,
    workload: Annotated[str, typer.Option(help="File of requests: Azure, Mooncake or BurstGPT.")] = "",
    policies: Annotated[str, typer.Option(help="Names with commas between them; `all` for every one.")] = "",
    seeds: Annotated[int, typer.Option(help="Of synthetic arrivals; a workload is its own only one.")] = 3,
    profile: Annotated[
        str, typer.Option(help="Folder of a profile of yours; without, SpotServe's published one.")
    ] = "",
    model: Annotated[str, typer.Option(help="Of the published profile: 6.7B, 20B or 30B.")] = "20B",
    type: Annotated[str, typer.Option(help="Instance type from the catalog, for memory, links and prices.")] = "",  # noqa: A002
    instances: Annotated[int, typer.Option(help="Instances that are wanted.")] = 8,
    duration: Annotated[float, typer.Option(help="Seconds of a synthetic fleet.")] = 1800.0,
    rate: Annotated[float | None, typer.Option(help="Requests per second; a workload is stretched to it.")] = None,
    cv: Annotated[float, typer.Option(help="Coefficient of variation of the gaps between synthetic arrivals.")] = 1.0,
    input_tokens: Annotated[int | None, typer.Option(help="Prompt of a request, with --profile.")] = None,
    output_tokens: Annotated[int | None, typer.Option(help="Output of a request, with --profile.")] = None,
    spot_price: Annotated[float, typer.Option(help="Dollars per hour of a spot instance; 0: the catalog's.")] = 0.0,
    on_demand_price: Annotated[float, typer.Option(help="The same of an on-demand instance.")] = 0.0,
    latency_price: Annotated[float, typer.Option(help="Dollars that a second of a request's latency is worth.")] = 0.01,
    slo: Annotated[float | None, typer.Option(help="Latency limit in seconds, for --miss-price.")] = None,
    miss_price: Annotated[float, typer.Option(help="Dollars that a request beyond --slo costs.")] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Folder for the page and the numbers.")] = None,
    workers: Annotated[int, typer.Option(help="Simulations at once; 0: as many as there are cores.")] = 0,
) -> None:
    """Simulate serving policies side by side on instances that come and go, and draw a page."""
    require("prefect", "mlflow", "numba", "cvxpy")
    from flows.local import run_evaluate
    from flows.study_inputs import DEFAULT_POLICIES, EvaluateRequest
    from perennial.settings import load_settings
    from planning.study.systems import SYSTEMS

    settings = load_settings()
    named = [name.strip() for name in policies.split(",") if name.strip()]
    request = valid(
        EvaluateRequest,
        availability=[str(Path(file).absolute()) for file in availability or ()],
        select=pairs(select),
        zones=zones,
        workload=str(Path(workload).absolute()) if workload else "",
        policies=list(SYSTEMS) if named == ["all"] else named or DEFAULT_POLICIES,
        seeds=seeds,
        profile=str(Path(profile).absolute()) if profile else "",
        model=model,
        instance_type=type,
        instances=instances,
        duration_s=duration,
        rate_rps=rate,
        cv=cv,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        spot_usd_h=spot_price,
        on_demand_usd_h=on_demand_price,
        latency_usd=latency_price,
        slo_s=slo,
        miss_usd=miss_price,
        workers=workers or cpu_count() or 1,
        home=str(settings.home.absolute()),
        registry=settings.registry_uri,
        out=str(out.absolute()) if out else "",
    )
    with _bar() as report:
        result = run_evaluate(request, on_progress=report)
    console = Console()
    console.print(_table(result["rows"], request.policies))
    console.print(f"page {result['page']}, numbers {result['results']}, MLflow run {result['run_id']}", soft_wrap=True)


def _table(rows: Sequence[Mapping[str, Any]], policies: Sequence[str]) -> Table:
    """Latencies in seconds, dollars, and GB moved, of every policy on every fleet."""
    table = Table("fleet", "policy", title="seconds of latency and of the longest pause; means over seeds")
    for name in ("mean", "P90", "P99", "late", "$", "GB", "pause"):
        table.add_column(name, justify="right")
    for row in rows:
        if row["policy"] in policies:
            times = (_number(row[key]) for key in ("mean_s", "p90_s", "p99_s"))
            rest = (f"{row['unfinished']:.0f}", f"{row['usd']:.2f}", f"{row['moved_gb']:.0f}")
            table.add_row(row["trace"], row["policy"], *times, *rest, _number(row["longest_pause_s"]))
    return table


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:.3g}"


@contextmanager
def _bar() -> Iterator[Callable[[Step], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("solving the policy", total=None)

        def report(step: Step) -> None:
            progress.update(task, description="simulating", completed=step.done, total=step.total or None)

        yield report
