"""`python -m benchmarks.fidelity --out DIR`: real runs beside their simulations, as `fidelity.json`, `.md` and `.html`.

Exit code 1 if a bar is missed: of a fleet of one model the mean latency within 10 % of the measured one and P99
within 15 %, of a fleet of several models the share of requests answered in time within 3 points.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.fidelity import compare, shared_compare
from benchmarks.fidelity.alone import NAMED, create_models
from benchmarks.fidelity.crew import Job, play_all, shares_of
from benchmarks.fidelity.drag import elasticity
from benchmarks.fidelity.measure import Measured
from benchmarks.fidelity.page import markdown, tables, write_page
from benchmarks.fidelity.recording import Recorded, Recording, SharedRecording, read
from benchmarks.fidelity.scripts import Script
from benchmarks.fidelity.shared_scripts import MODELS, SharedScript
from data.errors import InvalidInput, PerennialError
from perennial.demo.setting import CPU
from planning.step_laws import Observed
from serving.engine.checkpoint import create_checkpoint
from serving.engine.weights import read_spec

Result = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Play, simulate, compare, write; 0 if every bar is met."""
    options = _options(arguments)
    begun = time.monotonic()
    try:
        recorded, results = _recorded(options)
        results |= _compare_all(recorded) | {"seconds": round(time.monotonic() - begun, 1)}
    except PerennialError as error:
        print(error, file=sys.stderr)
        return 2
    _write(options.out, results)
    runs = [*results["runs"], *results["shared_runs"]]
    return 0 if runs and not results["failed"] and all(run["met"] for run in runs) else 1


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for fidelity.json, .md and .html, and recordings.jsonl"
    )
    parser.add_argument("--only", nargs="*", default=[], help="only scripts whose name contains one of these words")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="each script is played with each of them")
    parser.add_argument("--jobs", type=int, default=1, help="fleets side by side, each on processors of its own")
    parser.add_argument(
        "--recorded", type=Path, nargs="*", default=[], help="play nothing; compare the runs of these files again"
    )
    return parser.parse_args(arguments)


def _recorded(options: argparse.Namespace) -> tuple[list[Recorded], Result]:
    """The runs, and which failed."""
    if options.recorded:
        return list(read(options.recorded)), {"failed": [], "recorded": [path.name for path in options.recorded]}
    jobs = [Job(name, seed) for seed in options.seeds for name in _chosen(options.only)]
    processors = shares_of(sorted(os.sched_getaffinity(0)), options.jobs)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "recordings.jsonl"
    path.unlink(missing_ok=True)
    failed = asyncio.run(play_all(jobs, processors, path))
    played = list(read([path])) if path.exists() else []
    return played, {"failed": failed, "jobs": options.jobs}


def _chosen(words: list[str]) -> list[str]:
    return [name for name in NAMED if not words or any(word in name for word in words)]


def _compare_all(recorded: list[Recorded]) -> Result:
    """Every run beside its simulation, and what all fleets of one model were charged for their changes."""
    everything, again = Measured(), list[tuple[Observed, Observed]]()
    for one in recorded:
        if isinstance(one, Recording):
            everything.add_changes(one.measured)
            again += one.measured.twice()
    feel = elasticity(again)
    with tempfile.TemporaryDirectory(prefix="perennial-fidelity-") as folder:
        specs = {name: read_spec(path) for name, path in create_models(Path(folder), list(MODELS)).items()}
        create_checkpoint(str(Path(folder) / "model"), seed=0, **CPU.model)
        spec = read_spec(str(Path(folder) / "model"))
    runs, shared_runs = list[Result](), list[Result]()
    for one in recorded:
        script, cores = NAMED.get(one.script), one.machine["cores"]
        if isinstance(one, Recording) and isinstance(script, Script):
            told = one.played, one.measured
            runs.append(
                compare.compared(script, one.seed, told, everything.charges(), spec, processors=cores, feel=feel)
            )
        elif isinstance(one, SharedRecording) and isinstance(script, SharedScript):
            shared_runs.append(shared_compare.compared(script, one.seed, one.played, specs, processors=cores))
        else:
            raise InvalidInput(f"no script is called {one.script!r} any more; record it again")
    machines = list({json.dumps(one.machine, sort_keys=True): one.machine for one in recorded}.values())
    bars = {"mean": compare.MEAN_BAR, "p99": compare.P99_BAR, "attainment": shared_compare.ATTAINMENT_BAR}
    machine = machines[0] if len(machines) == 1 else machines
    about: Result = {"machine": machine, "bars": bars, "feel": round(feel, 3), "samples": everything.changes}
    return about | {"runs": runs, "shared_runs": shared_runs}


def _write(out: Path, results: Result) -> None:
    for shown in tables(results):
        Console().print(shown)
    out.mkdir(parents=True, exist_ok=True)
    (out / "fidelity.md").write_text(markdown(results), encoding="utf-8")
    runs = [{key: value for key, value in run.items() if key != compare.TRACE} for run in results["runs"]]
    written = json.dumps(results | {"runs": runs}, indent=1) + "\n"
    (out / "fidelity.json").write_text(written, encoding="utf-8")
    if find_spec("matplotlib"):
        write_page(out / "fidelity.html", results)
    else:
        print("matplotlib is not here: no page; `--recorded` writes it where it is", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
