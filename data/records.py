"""Reading rows of text files, so that a bad one is reported with its file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

from data.errors import CorruptData


@dataclass(frozen=True, slots=True)
class Record:
    """One row: where it stands, and its fields by name."""

    path: str
    line: int
    fields: Mapping[str, Any]

    def number(self, name: str, *, least: float = 0.0) -> float:
        """A finite number of at least `least`. Raises `CorruptData`."""
        try:
            value = float(self.fields[name])
        except (KeyError, TypeError, ValueError):
            self.reject(f"{name} is not a number")
        if not math.isfinite(value) or value < least:
            self.reject(f"{name} must be at least {least:g}, not {value:g}")
        return value

    def integer(self, name: str, *, least: int = 0) -> int:
        """A whole number of at least `least`. Raises `CorruptData`."""
        value = self.number(name, least=least)
        if value != int(value):
            self.reject(f"{name} must be a whole number, not {value:g}")
        return int(value)

    def reject(self, why: str) -> NoReturn:
        """Raise `CorruptData` naming file and line."""
        raise CorruptData(f"{self.path}, line {self.line}: {why}")


def csv_records(path: str | os.PathLike[str], *, names: Sequence[str] = ()) -> Iterator[Record]:
    """Rows of a CSV file under its header line, or under `names` if it has none; `.gz` is decompressed.

    Raises `CorruptData`.
    """
    for number, row in _lines(path, lambda file: csv.reader(file, strict=True)):
        if not names:
            names = [name.strip().removeprefix("\ufeff") for name in row]
        elif row and len(row) != len(names):
            raise CorruptData(f"{path}, line {number}: {len(row)} fields where the header has {len(names)}")
        elif row:
            yield Record(str(path), number, dict(zip(names, row, strict=True)))


def json_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """Line number and value of every line that is not blank; `.gz` is decompressed. Raises `CorruptData`."""
    for number, line in _lines(path, lambda file: file):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise CorruptData(f"{path}, line {number}: not JSON") from error


def load_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file. Raises `CorruptData` if it is absent or damaged."""
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise CorruptData(f"{path} is absent or not JSON: {error}") from error


def first_line(path: str | os.PathLike[str]) -> str:
    """The first line, by which formats are told apart; empty for an empty file."""
    return next((line for _, line in _lines(path, lambda file: file)), "")


def _lines(path: str | os.PathLike[str], rows: Callable[[TextIO], Iterable[Any]]) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with _opened(path) as file:
            for number, row in enumerate(rows(file), start=1):
                yield number, row
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        raise CorruptData(f"{path}, line {number + 1}: the file cannot be read: {error}") from error


def _opened(path: str | os.PathLike[str]) -> TextIO:
    name = os.fspath(path)
    if name.endswith(".gz"):
        return io.TextIOWrapper(gzip.GzipFile(name), encoding="utf-8", newline="")
    return open(name, encoding="utf-8", newline="")
