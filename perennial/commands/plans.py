"""`perennial plans`: the versions in the registry, what they say, and which one is served."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from data.errors import InvalidInput
from perennial.commands.explanation import choice_of, print_book, print_plan
from perennial.commands.shared_explanation import print_shared_book

if TYPE_CHECKING:
    from flows.registry import Registry

plans = typer.Typer(name="plans", help="Plan books in the registry.", no_args_is_help=True)

Name = Annotated[str | None, typer.Option("--name", help="Registered plan; not needed if there is only one.")]
Version = Annotated[str, typer.Argument(help="A version number or an alias.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.add_typer(plans)


@plans.command("list")
def list_versions(name: Name = None) -> None:
    """List registered plans, newest first."""
    table = Table(Column("plan", overflow="fold", min_width=20), "version", "aliases", "created", "error", "sha256")
    for one in _registry().list_plans(name):
        created = datetime.fromtimestamp(one.created_s, UTC).strftime("%m-%d %H:%M")
        error = f"{_percent(one.tags, 'median')} / {_percent(one.tags, 'p90')}"
        table.add_row(one.name, one.version, ", ".join(one.aliases), created, error, one.sha256[:8])
    Console().print(table)


@plans.command()
def show(
    version: Version = "champion",
    name: Name = None,
    state: Annotated[str, typer.Option(help="Explain this state, such as local-cpu=3.")] = "",
    now: Annotated[str, typer.Option(help="With --state: while this runs, such as D2·P1·T1·B8.")] = "",
) -> None:
    """Show what a plan book runs in every state, and why; with --state, what was chosen from."""
    from data.cluster import ClusterState
    from data.layout import ParallelConfig
    from data.shared_plan import SharedPlanBook

    registry = _registry()
    book = registry.load_plan(_only(registry, name), version)
    if isinstance(book, SharedPlanBook):
        print_shared_book(book, ClusterState.from_key(state) if state else None)
        return
    if not state:
        print_book(book)
        return
    in_force = ParallelConfig.from_key(now) if now else None
    print_plan(book, book.plan_for(ClusterState.from_key(state), in_force), in_force)


@plans.command()
def diff(before: Version, after: Version, name: Name = None) -> None:
    """Show the states in which two versions choose differently."""
    registry = _registry()
    changes = registry.diff(_only(registry, name), before, after)
    table = Table("state", before, after)
    for change in changes:
        old, new = choice_of(change.before), choice_of(change.after)
        table.add_row(change.state.key, old, f"{new} (other transitions)" if new == old else new)
    Console().print(table if changes else f"{before} and {after} choose the same configurations")


@plans.command()
def promote(
    version: Version,
    alias: Annotated[str, typer.Option(help="champion (served), challenger or last-good.")] = "champion",
    name: Name = None,
) -> None:
    """Point an alias at a version; the serving tier follows the champion."""
    registry = _registry()
    chosen = _only(registry, name)
    number = registry.promote(chosen, version, alias)
    Console().print(f"{chosen} version {number} is now {alias}")


@plans.command()
def rollback(name: Name = None) -> None:
    """Swap the champion with the last good version."""
    registry = _registry()
    chosen = _only(registry, name)
    Console().print(f"{chosen} version {registry.rollback(chosen)} is champion again")


def _registry() -> Registry:
    from flows.registry import Registry
    from perennial.settings import load_settings

    settings = load_settings()
    return Registry(settings.registry_uri, settings.home / "mlflow-artifacts")


def _only(registry: Registry, name: str | None) -> str:
    """The plan that is meant: the one named, or the only one there is."""
    if name is not None:
        return name
    names = sorted({one.name for one in registry.list_plans()})
    if len(names) != 1:
        known = f"choose one with --name: {', '.join(names)}" if names else "make one with `perennial plan`"
        raise InvalidInput(f"there are {len(names)} registered plans; {known}")
    return names[0]


def _percent(tags: Mapping[str, str], which: str) -> str:
    value = tags.get(f"cost_model_error_{which}")
    return f"{float(value):.1%}" if value else "–"
