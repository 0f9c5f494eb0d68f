"""`python -m benchmarks.cases DIR --out DIR`: checks every case file found in a folder of reference cases.

DIR may also hold such folders. Files without a checker are named, not failed. Exit code 1 on a miss.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.alpaserve_cases import check_placements
from benchmarks.alpaserve_files import is_planning_case
from benchmarks.checks import Checker, Document, FileReport, Folder, Verdict
from benchmarks.spotserve_cases import CHECKERS
from data import catalog
from data.errors import PerennialError

# SpotServe's published T4 profiles, for folders of rows that come without them (source and licence inside).
_PUBLISHED = {"profiles.json": Path(catalog.__file__).with_name("spotserve_profiles.json")}
_INPUTS = ("profiles.json", "arrivals.npz", "README.md")
_WRONG = (KeyError, IndexError, TypeError, ValueError, AttributeError, PerennialError)


def check_folder(path: Path) -> list[FileReport]:
    """Reports on every file of the folder and of its subfolders, in order of name."""
    load = _loader(path)
    files = [entry for entry in sorted(path.iterdir()) if entry.is_file()]
    reports = [_check_file(entry, Folder(path, entry.name, load)) for entry in files]
    return reports + [report for entry in sorted(path.iterdir()) if entry.is_dir() for report in check_folder(entry)]


def _loader(path: Path) -> Callable[[str], Document]:
    @cache
    def load(name: str) -> Document:
        file = path / name
        if not file.exists():
            file = _PUBLISHED.get(name, file)
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError(f"{name} is not a JSON mapping")
        return document

    return load


def _check_file(file: Path, folder: Folder) -> FileReport:
    name = f"{file.parent.name}/{file.name}"
    if file.name in _INPUTS or file.suffix == ".npz":
        return FileReport(name, (), "input")
    key, checker = _checker(file)
    if checker is None and file.suffix != ".json":
        return FileReport(name, (), "no checker yet")
    try:
        document = folder.load(file.name)
    except (OSError, ValueError) as error:
        unreadable = Verdict("the file", float("inf"), f"cannot be read: {error}")
        return FileReport(name, (unreadable,)) if checker else FileReport(name, (), "no checker yet")
    if is_planning_case(document):
        return _run(name, check_placements, document, folder)
    if checker is None:
        return FileReport(name, (), "no checker yet")
    if key not in document:
        return FileReport(name, (), "no checker yet: not in SpotServe's format")
    return _run(name, checker, document, folder)


def _checker(file: Path) -> tuple[str, Checker | None]:
    """By name; `optimizer_even.json` holds rows of the same kind as `optimizer.json`."""
    kinds = sorted((name for name in CHECKERS if file.stem.startswith(Path(name).stem)), key=len)
    return CHECKERS[kinds[-1]] if kinds and file.suffix == ".json" else ("", None)


def _run(name: str, checker: Checker, document: Document, folder: Folder) -> FileReport:
    """A case that its checker cannot read is a miss; a missing input file means that nothing can be checked."""
    verdicts: list[Verdict] = []
    try:
        for verdict in checker(document, folder):
            verdicts.append(verdict)
    except FileNotFoundError as error:
        return FileReport(name, (), f"not checked: {Path(str(error.filename)).name} is missing")
    except _WRONG as error:
        problem = f"cannot be checked: {type(error).__name__} {error}"
        verdicts.append(Verdict(f"case {len(verdicts) + 1} and those after it", float("inf"), problem))
    return FileReport(name, tuple(verdicts))


def as_json(reports: list[FileReport]) -> dict[str, Any]:
    """The reports as the JSON document that is written."""
    return {
        "files": [
            {
                "file": report.file,
                "note": report.note,
                "cases": len(report.verdicts),
                "met": len(report.verdicts) - len(report.missed),
                "missed": [{"case": v.case, "miss": _finite(v.miss), "detail": v.detail} for v in report.missed],
            }
            for report in reports
        ]
    }


def _finite(miss: float) -> float | str:
    return "wrong" if miss == float("inf") else miss


def _table(reports: list[FileReport]) -> Table:
    table = Table("file", "cases", "met", "missed", "worst miss")
    for report in reports:
        worst, cases, missed = report.worst, len(report.verdicts), len(report.missed)
        shown = f"{worst.case}: {_finite(worst.miss)} {worst.detail}"[:200] if worst else report.note
        table.add_row(report.file, str(cases), str(cases - missed), str(missed), shown)
    return table


def main(arguments: list[str] | None = None) -> int:
    """Check, print the table, write `cases.json`; 1 if a case was missed, 2 if there is no such folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=None, help="folder for cases.json")
    options = parser.parse_args(arguments)
    console = Console()
    if not options.folder.is_dir():
        console.print(f"{options.folder} is not a folder; give a folder of reference cases")
        return 2
    reports = check_folder(options.folder)
    console.print(_table(reports))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        from profiling.fingerprint import this_machine  # torch takes a second that a look at the table need not

        result = {"machine": this_machine().to_json(), **as_json(reports)}
        (options.out / "cases.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 1 if any(report.missed for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
