"""Entry point of the chaos benchmark: plays seeds, prints a table, exits 1 if one did not hold."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.chaos.hard import hard_script
from benchmarks.chaos.outcome import Outcome, record, totals
from benchmarks.chaos.play import MODEL, Stage, play, replication_settings, request_pool
from benchmarks.chaos.script import script
from perennial.nursery import Nursery
from perennial.processes import Start, start_command
from perennial.reference import reference_streams
from profiling.fingerprint import this_machine
from serving.engine.checkpoint import create_checkpoint

_POOL = 48
_COLUMNS = ("seed", "streams", "cancelled", "tokens", "layouts", "recoveries", "seconds", "result")


def main() -> int:
    """Play the seeds; 0 if every one held."""
    arguments = _arguments()
    # a killed controller makes gRPC and asyncio complain; the outcome says what matters
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="perennial-chaos-") as folder,
        _starter(Path(folder), forked=not arguments.fresh) as start,
    ):
        outcomes, records = asyncio.run(_play_all(arguments, Path(folder), start))
    summary = totals(outcomes, wall_s=time.monotonic() - began)
    how = {"hard": arguments.hard, "jobs": arguments.jobs, "replication": _replicates(arguments)}
    result = {"machine": this_machine().to_json(), **how, "totals": summary, "runs": records}
    (arguments.out / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
    Console().print(summary)
    return 0 if all(outcome.held for outcome in outcomes) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=50, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed; with --seeds 1 it repeats one run")
    parser.add_argument("--hard", action="store_true", help="bursts of failures in every phase of a change")
    parser.add_argument("--jobs", type=int, default=2, help="seeds played at a time")
    parser.add_argument("--replication", choices=("on", "off"), default="on", help="where the service can replicate")
    parser.add_argument("--fresh", action="store_true", help="start an interpreter for every process; slower")
    parser.add_argument("--out", type=Path, required=True, help="folder for chaos.json and the logs of failures")
    return parser.parse_args()


def _replicates(arguments: argparse.Namespace) -> bool:
    return arguments.replication == "on" and bool(replication_settings(enabled=True))


@contextmanager
def _starter(folder: Path, *, forked: bool) -> Iterator[Start]:
    if not forked or sys.platform != "linux":
        yield start_command
        return
    with Nursery(folder) as nursery:
        yield nursery.start


async def _play_all(
    arguments: argparse.Namespace, folder: Path, start: Start
) -> tuple[list[Outcome], list[dict[str, Any]]]:
    console, began = Console(), time.monotonic()
    checkpoint = str(folder / "model")
    create_checkpoint(checkpoint, **MODEL)  # type: ignore[arg-type]
    pool = request_pool(_POOL, hard=arguments.hard)
    reference = reference_streams(checkpoint, pool)
    console.print(f"undisturbed run of {len(pool)} requests: {time.monotonic() - began:.1f} s")
    stage = Stage(checkpoint, pool, reference, start, replication=arguments.replication == "on")
    free, played = asyncio.Semaphore(arguments.jobs), 0

    async def one(seed: int) -> tuple[Outcome, dict[str, Any]]:
        nonlocal played
        async with free:
            plan = (hard_script if arguments.hard else script)(seed, pool=_POOL)
            home = arguments.out / f"seed-{seed}"
            shutil.rmtree(home, ignore_errors=True)
            outcome = await play(plan, stage, home)
            _keep_failure(home, entry := record(plan, outcome), held=outcome.held)
        played += 1
        progress = f"{played}/{arguments.seeds} after {time.monotonic() - began:.0f} s: seed"
        console.print(progress, " ".join(_cells(outcome)), soft_wrap=True)
        return outcome, entry

    seeds = range(arguments.first, arguments.first + arguments.seeds)
    results = await asyncio.gather(*(one(seed) for seed in seeds))
    outcomes = [outcome for outcome, _ in results]
    console.print(_table(outcomes))
    for outcome in outcomes:
        if not outcome.held:
            console.print(f"seed {outcome.seed}: {outcome.difference}; {'; '.join([*outcome.wrong, *outcome.errors])}")
    return outcomes, [entry for _, entry in results]


def _keep_failure(home: Path, entry: dict[str, Any], *, held: bool) -> None:
    if held:
        shutil.rmtree(home, ignore_errors=True)
    else:
        (home / "run.json").write_text(json.dumps(entry, indent=1) + "\n")


def _cells(outcome: Outcome) -> list[str]:
    verdict = "held" if outcome.held else "FAILED"
    numbers = (outcome.seed, outcome.streams, outcome.cancelled, outcome.tokens, outcome.layouts, outcome.recoveries)
    return [*map(str, numbers), f"{outcome.seconds:.1f}", verdict, ", ".join(outcome.done)]


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(*_COLUMNS)
    for outcome in outcomes:
        table.add_row(*_cells(outcome)[: len(_COLUMNS)])
    return table


if __name__ == "__main__":
    sys.exit(main())
