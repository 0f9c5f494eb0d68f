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
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.chaos.play import MODEL, Outcome, play, record, request_pool
from benchmarks.chaos.script import script
from perennial.reference import reference_streams
from profiling.fingerprint import this_machine
from serving.engine.checkpoint import create_checkpoint

_POOL = 48
_COLUMNS = ("seed", "streams", "cancelled", "tokens", "layouts", "recoveries", "seconds", "result", "what happened")


def main() -> int:
    """Play the seeds; 0 if every one held."""
    parser = argparse.ArgumentParser(prog="benchmarks.chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=50, help="how many seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed; with --seeds 1 it repeats one run")
    parser.add_argument("--out", type=Path, required=True, help="folder for chaos.json and the logs of failures")
    arguments = parser.parse_args()
    # a killed controller makes gRPC and asyncio complain; the outcome says what matters
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="perennial-chaos-") as folder:
        outcomes, records = asyncio.run(_play_all(arguments.first, arguments.seeds, Path(folder), arguments.out))
    result = {"machine": this_machine().to_json(), "totals": _totals(outcomes), "runs": records}
    (arguments.out / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
    console = Console()
    console.print(_totals(outcomes))
    return 0 if all(outcome.held for outcome in outcomes) else 1


async def _play_all(first: int, seeds: int, folder: Path, out: Path) -> tuple[list[Outcome], list[dict[str, Any]]]:
    console = Console()
    outcomes: list[Outcome] = []
    records: list[dict[str, Any]] = []
    checkpoint = str(folder / "model")
    create_checkpoint(checkpoint, **MODEL)  # type: ignore[arg-type]
    pool = request_pool(_POOL)
    began = time.monotonic()
    reference = reference_streams(checkpoint, pool)
    console.print(f"undisturbed run of {len(pool)} requests: {time.monotonic() - began:.1f} s")
    for seed in range(first, first + seeds):
        plan, home = script(seed, pool=_POOL), out / f"seed-{seed}"
        shutil.rmtree(home, ignore_errors=True)
        outcome = await play(plan, checkpoint, pool, reference, home)
        outcomes.append(outcome)
        records.append(record(plan, outcome))
        console.print(" ".join(_cells(outcome)), soft_wrap=True)
        if outcome.held:
            shutil.rmtree(home, ignore_errors=True)
        else:
            (home / "run.json").write_text(json.dumps(record(plan, outcome), indent=1) + "\n")
    console.print(_table(outcomes))
    for outcome in outcomes:
        if not outcome.held:
            console.print(f"seed {outcome.seed}: {outcome.difference}; {'; '.join([*outcome.wrong, *outcome.errors])}")
    return outcomes, records


def _cells(outcome: Outcome) -> list[str]:
    verdict = "held" if outcome.held else "FAILED"
    numbers = (outcome.seed, outcome.streams, outcome.cancelled, outcome.tokens, outcome.layouts, outcome.recoveries)
    return [*map(str, numbers), f"{outcome.seconds:.1f}", verdict, ", ".join(outcome.done)]


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(*_COLUMNS)
    for outcome in outcomes:
        table.add_row(*_cells(outcome))
    return table


def _totals(outcomes: list[Outcome]) -> dict[str, float]:
    return {
        "seeds": len(outcomes),
        "held": sum(outcome.held for outcome in outcomes),
        "streams": sum(outcome.streams for outcome in outcomes),
        "tokens": sum(outcome.tokens for outcome in outcomes),
        "lost_tokens": sum(outcome.difference.lost for outcome in outcomes),
        "duplicated_tokens": sum(outcome.difference.duplicated for outcome in outcomes),
        "mismatched_tokens": sum(outcome.difference.mismatched for outcome in outcomes),
        "layouts": sum(outcome.layouts for outcome in outcomes),
        "recoveries": sum(outcome.recoveries for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
    }


if __name__ == "__main__":
    sys.exit(main())
