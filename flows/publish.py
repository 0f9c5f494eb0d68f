"""Publishing as a transaction: log → register → alias, or nothing of it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefect.runtime import flow_run
from prefect.transactions import Transaction, transaction

from flows.registry import Registry, Release

_ROOT = Path(__file__).resolve().parent.parent
_GIT_S = 2.0


@dataclass(frozen=True, slots=True)
class Published:
    """A version in the registry; `aliases` are those that point to it."""

    name: str
    version: str
    sha256: str
    aliases: tuple[str, ...]


def publish(registry: Registry, release: Release, alias: str | None = None) -> Published:
    """Publish a plan book and, if asked, point `alias` at it.

    A failure at any point leaves neither a version nor a moved alias, and is raised.
    """
    name = release.name
    with transaction():
        with transaction() as step:
            logged = registry.log(release)
            _undo_by(step, "discard_log", lambda: registry.discard(logged))
        with transaction() as step:
            if registry.ensure(name):
                _undo_by(step, "remove_model", lambda: registry.remove(name))
        with transaction() as step:
            _undo_by(step, "unregister", lambda: registry.unregister(name, logged))
            version = registry.register(name, logged, release.all_tags())
        if alias is not None:
            with transaction() as step:
                before = registry.aliases(name)
                _undo_by(step, "restore_aliases", lambda: registry.set_aliases(name, before))
                registry.promote(name, version, alias)
        held = tuple(sorted(key for key, value in registry.aliases(name).items() if value == version))
    return Published(name, version, release.book.sha256, held)


def _undo_by(step: Transaction, name: str, action: Callable[[], None]) -> None:
    """Run `action` if this or a later step of the transaction fails."""

    def undo(_: Transaction) -> None:
        action()

    undo.__name__ = name
    step.stage(name, on_rollback_hooks=[undo])


def publish_once(registry: Registry, release: Release, alias: str | None = None) -> Published:
    """`publish`, unless this very book is there already, with the alias that it is to have.

    A schedule that finds nothing new must not make the serving tier reload what it has.
    """
    for held in registry.list_plans(release.name):
        if held.sha256 == release.book.sha256 and (alias is None or alias in held.aliases):
            return Published(held.name, held.version, held.sha256, held.aliases)
    return publish(registry, release, alias)


def origin() -> dict[str, str]:
    """Which flow run and which commit made a version, as far as they are known."""
    known = {"flow_run": str(flow_run.id or ""), "flow_run_name": str(flow_run.name or ""), "git_commit": _commit()}
    return {name: value for name, value in known.items() if value}


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=_ROOT, capture_output=True, text=True, timeout=_GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
