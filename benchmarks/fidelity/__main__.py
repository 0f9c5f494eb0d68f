"""`python -m benchmarks.fidelity --out DIR`: real runs beside their simulations, as `fidelity.json`, `.md` and `.html`.

Exit code 1 if a bar is missed: the mean latency within 10 % of the measured one, and P99 within 15 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.fidelity.compare import MEAN_BAR, P99_BAR, TRACE, Result, compared, profile
from benchmarks.fidelity.measure import Measured
from benchmarks.fidelity.page import markdown, table, write_page
from benchmarks.fidelity.play import Played, play
from benchmarks.fidelity.scripts import SCRIPTS, Script
from perennial.demo.setting import CPU
from perennial.nursery import Nursery
from profiling.fingerprint import this_machine
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec
from serving.errors import PerennialError

Run = tuple[Script, int, Played, Measured]

_FAILURES = (PerennialError, TimeoutError, OSError)


def main(arguments: list[str] | None = None) -> int:
    """Play, simulate, compare, write; 0 if every bar is met."""
    options = _options(arguments)
    # a killed instance makes gRPC and asyncio complain; the results say what matters
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="perennial-fidelity-") as folder:
        results = _measure_all(options, Path(folder), begun)
    Console().print(table(results["runs"]))
    results |= {"machine": this_machine().to_json(), "seconds": round(time.monotonic() - begun, 1)}
    options.out.mkdir(parents=True, exist_ok=True)
    write_page(options.out / "fidelity.html", results)
    (options.out / "fidelity.md").write_text(markdown(results["runs"]), encoding="utf-8")
    runs = [{key: value for key, value in run.items() if key != TRACE} for run in results["runs"]]
    written = json.dumps(results | {"runs": runs}, indent=1) + "\n"
    (options.out / "fidelity.json").write_text(written, encoding="utf-8")
    held = results["runs"] and not results["failed"] and all(run["met"] for run in results["runs"])
    return 0 if held else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for fidelity.json, fidelity.md and fidelity.html"
    )
    parser.add_argument("--runs", type=int, default=len(SCRIPTS), help="only the first so many scripts")
    parser.add_argument("--only", nargs="*", default=[], help="only scripts whose name contains one of these words")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="each script is played with each of them")
    return parser.parse_args(arguments)


def _measure_all(options: argparse.Namespace, folder: Path, begun: float) -> dict[str, Any]:
    checkpoint = str(folder / "model")
    create_checkpoint(checkpoint, seed=0, **CPU.model)
    everything, runs, failed = Measured(), list[Run](), list[str]()
    with Nursery(folder) as nursery:
        for number, (script, seed) in enumerate(_chosen(options)):
            _say(begun, f"{script.name}, seed {seed}")
            try:
                played, measured = asyncio.run(play(script, seed, checkpoint, folder / str(number), nursery.start))
            except (*_FAILURES, ExceptionGroup) as error:
                failed.append(f"{script.name}, seed {seed}: {error!r}")
                _say(begun, failed[-1])
                continue
            runs.append((script, seed, played, measured))
            everything.add_changes(measured)
            served, happened, others = len(played.streams), len(played.happenings), played.foreign_cores[1]
            _say(begun, f"{served} requests served, {happened} things happened, others used {others:.2f} processors")
    found, charges = _compare_all(runs, everything, checkpoint)
    bars = {"mean": MEAN_BAR, "p99": P99_BAR}
    return {"bars": bars, "charges": charges, "samples": everything.changes, "failed": failed, "runs": found}


def _compare_all(runs: list[Run], everything: Measured, checkpoint: str) -> tuple[list[Result], Result]:
    """Every run beside its simulation, and what all were charged."""
    if not runs:
        return [], {}
    spec, charges = read_spec(checkpoint), everything.charges()
    found = [compared(script, seed, played, profile(own, charges, spec)) for script, seed, played, own in runs]
    return found, asdict(charges)


def _chosen(options: argparse.Namespace) -> list[tuple[Script, int]]:
    words = options.only
    named = [one for one in SCRIPTS if not words or any(word in one.name for word in words)]
    return [(script, seed) for seed in options.seeds for script in named[: options.runs]]


def _say(begun: float, text: str) -> None:
    print(f"[{time.monotonic() - begun:6.1f} s] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
