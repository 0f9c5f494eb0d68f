"""Tasks that planning for one model and for several have in common."""

# No postponed annotations: Prefect may evaluate them where this module's names are unknown.

from pathlib import Path
from typing import Any

from prefect import task
from prefect.context import TaskRunContext

from data.books import Book, read_book
from data.profile import Profile
from flows.publish import Published, origin, publish_once
from flows.registry import Release, open_registry
from flows.summary import FitError
from planning.costs import holdout_error


def _assessment_key(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    return f"fit-{parameters['profile_sha256']}"


@task(name="assess cost model", cache_key_fn=_assessment_key, persist_result=True, result_serializer="json")
def assess_costs(profile_sha256: str, folder: str) -> list[float]:
    """Median and 90th percentile of the relative error on points held out of the fit."""
    return list(holdout_error(Profile.read(folder)))


@task(name="publish plan", retries=2, retry_delay_seconds=1, persist_result=False)
def publish_book(
    content: str,
    error: FitError,
    settings: dict[str, Any],
    tags: dict[str, str],
    place: tuple[str, str],
    alias: str | None,
    profile: str = "",
) -> Published:
    """Log, register and promote in one transaction, unless this very book is there already.

    `content` is a book as its canonical JSON, `place` the home and the registry's URI (empty: that of the home),
    `profile` the folder of the only model's profile.
    """
    release = Release(
        book=read_book(content.encode()),
        profile=Profile.read(profile) if profile else None,
        error=error,
        settings={name: str(value) for name, value in settings.items()},
        tags={**origin(), **tags},
    )
    return publish_once(open_registry(*place), release, alias)


def write_book(book: Book, folder: Path) -> Path:
    """Write a book under its checksum, for `perennial serve --plan`; returns the file, which is whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / f"{book.sha256[:16]}.json").absolute()
    partial = path.with_suffix(".partial")
    partial.write_bytes(book.to_bytes())
    return partial.replace(path)
