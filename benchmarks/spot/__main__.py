"""`python -m benchmarks.spot --out DIR [--seeds 20]`: the study, its bars, `spot.json` and `spot.html`.

Exit code 1 if a bar is missed; the report says for each how far a bound allows to get.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.spot.bars import bars
from benchmarks.spot.inputs import REFERENCE, Inputs
from benchmarks.spot.page import bar_table, panel_table, write_page
from benchmarks.spot.study import run
from planning.study.results import finite
from profiling.fingerprint import this_machine


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write; 1 if a bar is missed, 2 without the reference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spot", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for spot.json and spot.html")
    parser.add_argument("--seeds", type=int, default=20, help="of bursty arrivals")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    options = parser.parse_args(arguments)
    console = Console()
    if not options.reference.is_dir():
        console.print(f"{options.reference} is not a folder; give the folder of SpotServe's reference cases")
        return 2
    begun = time.perf_counter()
    with console.status("reading") as status:
        result: dict[str, Any] = run(Inputs(options.reference), options.seeds, status.update)
    result["bars"] = bars(result)
    result["seeds"], result["seconds"] = options.seeds, round(time.perf_counter() - begun, 1)
    console.print(panel_table(result["panels"]), bar_table(result["bars"]))
    options.out.mkdir(parents=True, exist_ok=True)
    written = finite({"machine": this_machine().to_json(), **result})
    (options.out / "spot.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    write_page(options.out / "spot.html", result)
    return 1 if any(not bar["met"] for bar in result["bars"]) else 0


if __name__ == "__main__":
    sys.exit(main())
