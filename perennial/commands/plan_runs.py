"""What `perennial plan` runs and says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from perennial.commands.explanation import print_book
from perennial.commands.shared_explanation import print_shared_book

if TYPE_CHECKING:
    from flows.fleet_steps import FleetRequest, FleetResult
    from flows.plan import PlanRequest, PlanResult
    from profiling.campaign import Progress as Step


def run_model(request: PlanRequest, schedule: tuple[str, float] | None) -> None:
    """Plan for one model, once or on a schedule (a cron expression, or seconds between runs)."""
    from data.plan import PlanBook
    from flows.local import run_plan

    if schedule is not None:
        _keep_planning(request, *schedule)
        return
    with bar() as report:
        result = run_plan(request, on_progress=report)
    print_book(PlanBook.from_bytes(Path(result["book"]).read_bytes()))
    _print_version(result)


def run_fleet(request: FleetRequest, schedule: tuple[str, float] | None) -> None:
    """Plan for several models, once or on a schedule."""
    from data.shared_plan import SharedPlanBook
    from flows.local import run_plan_fleet

    if schedule is not None:
        _keep_planning(request, *schedule)
        return
    with bar() as report:
        result = run_plan_fleet(request, on_progress=report)
    if not result["book"]:
        which = f"{result['name']} version {result['version']} ({', '.join(result['aliases'])})"
        Console().print(f"recent requests are those that {which} counts on; nothing is planned")
        return
    print_shared_book(SharedPlanBook.from_bytes(Path(result["book"]).read_bytes()))
    _print_version(result)
    if result["drift"]:
        Console().print(f"see `perennial plans diff champion {result['version']}` and `perennial plans promote`")


def _keep_planning(request: PlanRequest | FleetRequest, cron: str, every: float) -> None:
    from flows.local import serve_plan

    Console().print(f"planning {f'at {cron!r}' if cron else f'every {every:g} s'}; stop with Ctrl-C")
    serve_plan(request, cron=cron, every_s=0.0 if cron else every)


def _print_version(result: PlanResult | FleetResult) -> None:
    error, aliases = result["cost_model_error"], ", ".join(result["aliases"]) or "no alias"
    console = Console()
    console.print(f"{result['name']} version {result['version']} ({aliases}); plan book {result['book']}")
    console.print(f"cost model error on held-out points: median {error['median']:.1%}, P90 {error['p90']:.1%}")


@contextmanager
def bar() -> Iterator[Callable[[Step], None]]:
    """A progress bar on standard error, and what moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def report(step: Step) -> None:
            progress.update(task, description=f"measuring {step.what}", completed=step.done, total=step.total or None)

        yield report
