"""Measurements of one model on one machine: step times and link times, with where they were taken."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from data.canonical import canonical_json, checksum, exactly
from data.errors import CorruptData, InvalidInput
from data.fingerprint import Fingerprint
from data.models import ModelSpec

SCHEMA_VERSION = 1

# phase: "prefill" | "decode"; part: "layers" (the decoder layers of one stage, with the collectives of tensor
# parallelism), "embed", "head", or "step" (fixed cost of driving one step); layers: decoder layers timed; shards:
# tensor-parallel degree; batch: sequences; tokens: new tokens of each sequence; context: tokens of each sequence
# cached before; time_ms: median; spread_ms: 90th minus 10th percentile; repeats: samples behind both.
STEPS = pa.schema(
    [
        pa.field("phase", pa.string(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("layers", pa.int32(), nullable=False),
        pa.field("shards", pa.int32(), nullable=False),
        pa.field("batch", pa.int32(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("context", pa.int32(), nullable=False),
        pa.field("time_ms", pa.float64(), nullable=False),
        pa.field("spread_ms", pa.float64(), nullable=False),
        pa.field("repeats", pa.int32(), nullable=False),
    ]
)

# kind: "local" (between devices of an instance), "network" (between instances), "disk" (from the checkpoint) or
# "host" (between host and device); bytes: size of the message; time_ms: median one-way; repeats: samples.
LINKS = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("time_ms", pa.float64(), nullable=False),
        pa.field("repeats", pa.int32(), nullable=False),
    ]
)

PHASES = ("prefill", "decode")
PARTS = ("layers", "embed", "head", "step")
LINK_KINDS = ("local", "network", "disk", "host")


@dataclass(frozen=True, slots=True)
class Profile:
    """Measured `steps` (schema `STEPS`) and `links` (schema `LINKS`) of `model` on `fingerprint`.

    Raises `InvalidInput` if a table has another schema or holds an unknown phase, part or kind.
    """

    model: ModelSpec
    fingerprint: Fingerprint
    steps: pa.Table
    links: pa.Table

    def __post_init__(self) -> None:
        for name, table, schema in (("steps", self.steps, STEPS), ("links", self.links, LINKS)):
            if not table.schema.equals(schema):
                raise InvalidInput(f"the {name} table of a profile must have the columns {', '.join(schema.names)}")
        _check_words(self.steps, "phase", PHASES)
        _check_words(self.steps, "part", PARTS)
        _check_words(self.links, "kind", LINK_KINDS)

    @classmethod
    def of(
        cls,
        model: ModelSpec,
        fingerprint: Fingerprint,
        steps: list[dict[str, Any]],
        links: list[dict[str, Any]],
    ) -> Profile:
        """The profile of row mappings, one per measurement."""
        return cls(model, fingerprint, _table(steps, STEPS), _table(links, LINKS))

    @property
    def sha256(self) -> str:
        """Checksum of model, fingerprint and every measurement in order, whatever file they came from."""
        return checksum({**self._header(), "steps": self.steps.to_pylist(), "links": self.links.to_pylist()})

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a directory of `steps.parquet`, `links.parquet` and, last, `profile.json`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        parquet.write_table(self.steps, folder / "steps.parquet")
        parquet.write_table(self.links, folder / "links.parquet")
        partial = folder / "profile.json.partial"
        partial.write_bytes(canonical_json({**self._header(), "sha256": self.sha256}))
        partial.replace(folder / "profile.json")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what `write` wrote. Raises `CorruptData` if a file is absent, truncated or changed."""
        folder = Path(path)
        header = _read_header(folder / "profile.json")
        steps, links = (_read_table(folder / name) for name in ("steps.parquet", "links.parquet"))
        try:
            model, fingerprint = ModelSpec.from_json(header["model"]), Fingerprint.from_json(header["fingerprint"])
            profile = cls(model, fingerprint, steps, links)
        except (InvalidInput, TypeError, ValueError, AttributeError) as error:
            raise CorruptData(f"the profile in {folder} cannot be read ({error}); measure it again") from error
        if profile.sha256 != header["sha256"]:
            raise CorruptData(f"the checksum of the profile in {folder} is wrong; measure it again")
        return profile

    def _header(self) -> dict[str, Any]:
        model, fingerprint = self.model.to_json(), self.fingerprint.to_json()
        return {"schema_version": SCHEMA_VERSION, "model": model, "fingerprint": fingerprint}


def _check_words(table: pa.Table, column: str, allowed: tuple[str, ...]) -> None:
    unknown = sorted(set(table.column(column).to_pylist()) - set(allowed))
    if unknown:
        raise InvalidInput(f"{column} {unknown[0]!r} of a profile is not one of {', '.join(allowed)}")


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    for row in rows:
        if set(row) != set(schema.names):
            raise InvalidInput(f"a row of a profile needs the columns {', '.join(schema.names)}, not {', '.join(row)}")
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InvalidInput(f"a row of a profile has a value of the wrong type: {error}") from error


def _read_header(path: Path) -> Mapping[str, Any]:
    try:
        header = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CorruptData(f"there is no profile at {path.parent}; run `perennial profile`") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptData(f"{path} is not JSON; measure the profile again") from error
    version = header.get("schema_version", 0) if isinstance(header, dict) else 0
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise CorruptData(f"{path} has schema {version} and was made by a newer version; upgrade or measure again")
    return exactly(header, ("schema_version", "model", "fingerprint", "sha256"), str(path))


def _read_table(path: Path) -> pa.Table:
    try:
        return parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise CorruptData(f"{path} is absent or damaged; measure the profile again") from error
