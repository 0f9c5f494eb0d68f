"""Progress of a running flow: as a Prefect artifact, and to whoever listens in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from profiling.campaign import Progress

Listener = Callable[[Progress], None]

_listener: ContextVar[Listener | None] = ContextVar("progress_listener", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Tell `listener` about the flows that run within: a parameter of a flow has to be JSON, this has not."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def reporter(key: str) -> Listener:
    """A listener that passes on to the artifact `key` and to the one of `listening`."""
    created = create_progress_artifact(progress=0.0, key=key)
    artifact_id = created if isinstance(created, UUID) else None
    listener = _listener.get()

    def report(progress: Progress) -> None:
        if artifact_id is not None and progress.total:
            update_progress_artifact(artifact_id, progress=round(100 * progress.done / progress.total, 1))
        if listener is not None:
            listener(progress)

    return report
