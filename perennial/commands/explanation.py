"""Plan books in words and tables: what runs, what it was chosen from, and what a change or a loss means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from data.explanation import Estimate
    from data.layout import ParallelConfig
    from data.plan import Plan, PlanBook
    from data.shared_plan import SharedPlan

_MOST_EXPLAINED = 8  # states; a larger book is explained state by state


def print_book(book: PlanBook) -> None:
    """A plan book as a table, and the reasons; a small one with all that was chosen from."""
    console = Console()
    table = Table("state", "configuration", "latency s", "requests/s", "MB/device", "$/h", "of $/h", "keeps")
    for plan in book.plans:
        whole = f"{book.cluster.price_usd_h(plan.state):.2f}"
        *numbers, price, keeps = _numbers(plan.estimate)
        table.add_row(plan.state.key, choice_of(plan), *numbers, price, whole, keeps)
    console.print(f"{book.model.name} on {book.cluster.name}, policy {book.policy}, plan book {book.sha256[:12]}")
    console.print(table)
    if book.assumptions:
        console.print(f"It takes for granted: {book.assumptions}.")
    small = len(book.plans) <= _MOST_EXPLAINED
    for plan in book.plans:
        if small:
            print_plan(book, plan)
        else:
            console.print(f"[bold]{plan.state.key}[/bold]: {plan.reason}")
    if not small:
        console.print("`perennial plans show --state …` says what a state's plan was chosen from.")


def print_plan(book: PlanBook, plan: Plan, now: ParallelConfig | None = None) -> None:
    """One plan: why, what it was chosen from (with the way there from `now`), and what happens with less."""
    console = Console()
    console.print(f"[bold]{plan.state.key}[/bold]: {plan.reason}")
    if plan.frontier:
        start = now or plan.config
        table = Table("candidate", "latency s", "requests/s", "MB/device", "$/h", "keeps", f"from {start}", "beaten by")
        for one in plan.frontier:
            name = f"[bold]{one.config}[/bold]" if one.config == plan.config else str(one.config)
            move = book.move(start, one.config) if start else None
            table.add_row(name, *_numbers(one.estimate), str(move or ""), one.dominated_by)
        console.print(table)
    for loss in book.losses(plan):
        console.print(f"[dim]  {loss.words(plan.config)}[/dim]")


def choice_of(plan: Plan | SharedPlan | None) -> str:
    """What a plan runs, a configuration or groups, or a dash."""
    from data.shared_plan import SharedPlan

    if plan is None:
        return "–"
    if isinstance(plan, SharedPlan):
        return str(plan.deployment or "–")
    return plan.config.key if plan.config else "–"


def _numbers(estimate: Estimate | None) -> tuple[str, str, str, str, str]:
    if estimate is None:
        return "–", "–", "–", "–", "–"
    return (
        f"{estimate.latency_s:.3g}",
        f"{estimate.throughput_rps:.3g}",
        f"{estimate.memory_bytes / 1e6:.1f}",
        f"{estimate.price_usd_h:.2f}",
        estimate.residency,
    )
