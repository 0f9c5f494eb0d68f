"""Plan books of several models in words and tables: who runs where, what it attains, and what it counts on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from perennial.commands.explanation import choice_of

if TYPE_CHECKING:
    from data.cluster import ClusterState
    from data.shared_plan import SharedPlan, SharedPlanBook


def print_shared_book(book: SharedPlanBook, state: ClusterState | None = None) -> None:
    """A book as tables, and the reasons; with `state` only that one's plan."""
    console = Console()
    console.print(f"{book.title} on {book.cluster.name}, policy {book.policy}, plan book {book.sha256[:12]}")
    if book.occasion:
        console.print(f"{book.occasion}.", markup=False)
    if book.demands:
        console.print(_demands(book))
    plans = book.plans if state is None else [book.plan_for(state)]
    console.print(_plans(book, plans))
    for plan in plans:
        console.print(f"{plan.state.key}: {plan.reason}", markup=False)


def _demands(book: SharedPlanBook) -> Table:
    table = Table("model", "SLO s", "requests/s", "CV", "tokens in", "tokens out", "measured on")
    for one in book.demands:
        lengths = f"{one.input_tokens:.0f}", f"{one.output_tokens:.0f}"
        measured = f"{one.requests} requests" if one.requests else "told"
        table.add_row(one.model, f"{one.slo_s:g}", f"{one.rate_rps:.3g}", f"{one.cv:.2g}", *lengths, measured)
    return table


def _plans(book: SharedPlanBook, plans: tuple[SharedPlan, ...] | list[SharedPlan]) -> Table:
    table = Table("state", "groups", "in time", "at most", *(spec.name for spec in book.models))
    for plan in plans:
        if plan.forecast is None:
            shares = ["–"] * (2 + len(book.models))
        else:
            shares = [f"{one:.1%}" for one in (plan.forecast.attainment, plan.forecast.bound, *plan.forecast.by_model)]
        table.add_row(plan.state.key, choice_of(plan), *shares)
    return table
