"""A private Prefect API for one machine: its state under our home, on 127.0.0.1, gone with its parent.

Prefect can start such a server by itself, but that one is announced, listens on a guessed port and
outlives a killed parent.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import prefect.main  # noqa: F401  sets logging up; later, it would undo what is set below
import prefect.settings as settings
from prefect.settings import temporary_settings

from data.errors import PerennialError

_LOGGERS = ("prefect", "prefect.flow_runs", "prefect.task_runs", "prefect._internal")
_START_S = 60.0
_STOP_S = 5.0
_POLL_S = 0.05
_ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def prefect_api(home: Path, *, schedules: bool = False, log_level: int = logging.CRITICAL) -> Iterator[str]:
    """Run flows within: against the Prefect server that is configured, or one of our own with its state in `home`.

    Yields the API's URL. Results are JSON files under `home`; nothing is reported to anyone. Our own
    server starts scheduled runs only if `schedules` is set. By default Prefect's log of a failure is
    silenced: the exception is raised here.
    """
    home = home.absolute()
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(log_level)
    (home / "results").mkdir(parents=True, exist_ok=True)
    configured = settings.PREFECT_API_URL.value()
    with temporary_settings(_settings(home)):
        if configured:
            yield str(configured)
            return
        # Logs of a run would be sent in the background and miss a server that ends with us.
        own = {settings.PREFECT_LOGGING_TO_API_ENABLED: False}
        with _server(home, schedules=schedules) as url, temporary_settings({settings.PREFECT_API_URL: url, **own}):
            yield url


def _settings(home: Path) -> dict[settings.Setting, object]:
    return {
        settings.PREFECT_RESULTS_DEFAULT_SERIALIZER: "json",
        settings.PREFECT_LOCAL_STORAGE_PATH: str(home / "results"),
        settings.PREFECT_HOME: str(home),
        settings.PREFECT_SERVER_ANALYTICS_ENABLED: False,
    }


@contextmanager
def _server(home: Path, *, schedules: bool) -> Iterator[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(part for part in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if part),
        "PREFECT_HOME": str(home),
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_UI_ENABLED": "false",
        "PREFECT__SERVER_EPHEMERAL": "" if schedules else "1",
        "PREFECT__SERVER_FINAL": "1",
        "DO_NOT_TRACK": "1",
    }
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.prefect_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us; we still need the server to end runs in order
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield _answering(process, process.stdout.readline(), home)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdin.close()
        process.stdout.close()


def _answering(process: subprocess.Popen[bytes], port: bytes, home: Path) -> str:
    """The server's URL, once it answers."""
    url = f"http://127.0.0.1:{port.decode().strip()}/api"
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=1.0).status_code == httpx.codes.OK:
                return url
        except httpx.HTTPError:
            time.sleep(_POLL_S)
    raise PerennialError(f"Prefect's server did not start; see {home / 'server.log'}, or set PREFECT_API_URL to yours")
