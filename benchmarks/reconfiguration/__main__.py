"""`python -m benchmarks.reconfiguration --device cpu|cuda --out DIR`: exit code 1 if something does not hold.

`reconfiguration.json` is written anew after every measurement, so that what was seen outlasts a failure.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.reconfiguration import crash, long_run, planned, replicating
from benchmarks.reconfiguration.bars import bars, missed
from benchmarks.reconfiguration.link import measure_link
from benchmarks.reconfiguration.options import Options, parse
from benchmarks.reconfiguration.stage import Bench, last_words
from data.errors import PerennialError
from profiling.fingerprint import this_machine
from serving.engine.checkpoint import create_checkpoint

_FAILURES = (PerennialError, TimeoutError, OSError, KeyError, ValueError)
_LOG_LINES = 5
_PLACES = ("out", "scratch", "checkpoint")  # say where a run was, not what it measured


class Results:
    """The records of a run, written after each."""

    def __init__(self, options: Options) -> None:
        self._options, self._began = options, time.monotonic()
        self.records: list[dict[str, Any]] = []
        self.link_bytes_per_s: float | None = None
        options.out.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """Progress, for whoever waits."""
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)

    def add(self, record: dict[str, Any]) -> None:
        """Keep and write a record."""
        self.records.append(record)
        self.say(json.dumps(record, ensure_ascii=False)[:400])
        self.write()

    def write(self, machine: dict[str, Any] | None = None) -> None:
        """Write everything so far."""
        options = {name: value for name, value in asdict(self._options).items() if name not in _PLACES}
        result = {
            "machine": machine or {},
            "options": options,
            "seconds": round(time.monotonic() - self._began, 1),
            "link_bytes_per_s": self.link_bytes_per_s,
            "bars": [bar.to_json() for record in self.records for bar in bars(record)],
            "records": self.records,
        }
        text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
        partial = self._options.out / "reconfiguration.json.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self._options.out / "reconfiguration.json")


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, show; 0 if everything holds."""
    # a killed instance makes gRPC and asyncio complain; the records say what matters
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    options = parse(arguments)
    results = Results(options)
    with tempfile.TemporaryDirectory(prefix="perennial-reconfiguration-", dir=options.folder) as folder:
        checkpoint = _checkpoint(options, Path(folder), results)
        bench = Bench.of(options, checkpoint, results.say)
        asyncio.run(_measure_all(bench, results))
    results.write(this_machine(options.device, dtype=options.dtype).to_json())
    Console().print(_table(results.records))
    return 1 if missed(results.records) else 0


def _checkpoint(options: Options, folder: Path, results: Results) -> str:
    """The given checkpoint, or a new one; it ends with the run unless it was asked for by its path."""
    path = Path(options.checkpoint) if options.checkpoint else folder / "model"
    if not path.exists():
        create_checkpoint(str(path), **options.model, draw_on=options.device)
        results.say(f"checkpoint {path} made, {shutil.disk_usage(path).free >> 30} GiB left there")
    return str(path)


async def _measure_all(bench: Bench, results: Results) -> None:
    options = bench.options
    if "planned" in options.cases:
        results.link_bytes_per_s = await asyncio.to_thread(measure_link, options, bench.spec)
        results.say(f"link: {(results.link_bytes_per_s or 0) / 1e9:.2f} GB/s")
    for case in options.cases:
        try:
            await asyncio.wait_for(_case(case, bench, results), options.timeout_s)
        except _FAILURES as error:
            reason = f"{type(error).__name__}: {error}"
            logs = last_words(options.out / "logs", _LOG_LINES)
            results.add({"case": case, "name": case, "failed": reason, "logs": logs})


def _case(case: str, bench: Bench, results: Results) -> Awaitable[None]:
    if case == "planned":
        return planned.measure(bench, results.link_bytes_per_s, results.add)
    return {"kill": crash, "replication": replicating, "fleet": long_run}[case].measure(bench, results.add)


def _table(records: list[dict[str, Any]]) -> Table:
    table = Table("case", "what", "value", "limit", "verdict")
    for record in records:
        if "skipped" in record:
            table.add_row(record["name"], record["skipped"], "", "", "skipped")
        for bar in bars(record):
            value = "not seen" if bar.value is None else f"{bar.value:g}"
            limit = f"{'≥' if bar.least else '≤'} {bar.limit:g}"
            table.add_row(bar.case, bar.what, value, limit, "met" if bar.met else "MISSED")
    return table


if __name__ == "__main__":
    sys.exit(main())
