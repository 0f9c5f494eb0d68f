"""Publishing as a transaction: log → register → alias, or nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefect.transactions import Transaction, transaction

from flows.registry import Registry, Release


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
