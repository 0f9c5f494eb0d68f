"""The `perennial` command: groups of commands, and how errors leave the program."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from data.errors import InvalidInput, PerennialError
from perennial.commands import clients, demo, make, planning, plans, serving, simulate

app = typer.Typer(
    name="perennial",
    help="LLM serving that outlives its GPUs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logging.")] = False,
) -> None:
    """LLM serving that outlives its GPUs."""
    if debug:
        os.environ["PERENNIAL_DEBUG"] = "1"


for module in (demo, make, planning, plans, simulate, serving, clients):
    module.register(app)


def _fail(message: str, code: int) -> int:
    typer.secho(f"perennial: {message}", fg=typer.colors.RED, err=True)
    return code


def _explain(error: Exception) -> int:
    if os.environ.get("PERENNIAL_DEBUG", "0") not in ("", "0", "false", "False"):
        traceback.print_exception(error)
    if isinstance(error, InvalidInput):
        return _fail(str(error), 2)
    if isinstance(error, PerennialError):
        return _fail(str(error), 1)
    if isinstance(error, FileNotFoundError) and error.filename:
        return _fail(f"there is no file {error.filename}; check the path", 2)
    if isinstance(error, OSError):
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    return _fail(f"{type(error).__name__}: {error} (a bug; `perennial --debug …` shows where)", 1)


def main() -> None:
    """Entry point: exit code 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))
    except Exception as error:  # noqa: BLE001  the last resort: a sentence instead of a traceback
        sys.exit(_explain(error))


if __name__ == "__main__":
    main()
