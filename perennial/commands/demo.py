"""`perennial demo`: the main job, end to end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(demo)


def demo(
    seed: Annotated[int, typer.Option(min=0, help="Chooses requests and disturbances.")] = 0,
    short: Annotated[bool, typer.Option("--short", help="Fewer requests and shorter pauses.")] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda for two GPUs.")] = "cpu",
    exact: Annotated[
        bool, typer.Option("--exact", help="On cuda too: float32, tokens independent of the layout.")
    ] = False,
    plan: Annotated[Path | None, typer.Option(help="Serve this plan book instead of making one.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the numbers here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Where the report goes; by default into the home.")] = None,
) -> None:
    """Checkpoint, profile, plans, service, preemptions: then every stream is checked token by token."""
    from perennial.demo.run import DemoOptions, run

    sys.exit(run(DemoOptions(seed=seed, short=short, device=device, exact=exact, plan=plan, json=json, report=report)))
