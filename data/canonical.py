"""One byte string per value: the JSON form that checksums are taken over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

from data.errors import CorruptData


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces. Raises `ValueError` for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def checksum(value: Any) -> str:
    """SHA-256 of `canonical_json(value)`, in hexadecimal."""
    return sha256(canonical_json(value)).hexdigest()


def sealed(body: Mapping[str, Any]) -> bytes:
    """`body` as canonical JSON with its own checksum beside it; `unsealed` inverts it."""
    return canonical_json({**body, "sha256": checksum(body)})


def unsealed(content: bytes, newest: int, what: str) -> Mapping[str, Any]:
    """The body under an intact checksum. The version is looked at first: a newer one may differ in all else.

    `newest` is the highest `schema_version` that can be read. Raises `CorruptData` naming `what`.
    """
    try:
        document = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CorruptData(f"{what} is not JSON; publish it again") from error
    if not isinstance(document, dict):
        raise CorruptData(f"{what} is not a JSON mapping; publish it again")
    version = document.get("schema_version")
    if not isinstance(version, int) or version < 1:
        raise CorruptData(f"{what} has no schema version; publish it again")
    if version > newest:
        raise CorruptData(
            f"{what} has schema {version} and was made by a newer version; upgrade or republish "
            f"(this version reads up to {newest})"
        )
    body = {name: value for name, value in document.items() if name != "sha256"}
    try:
        intact = document.get("sha256") == checksum(body)
    except ValueError:
        intact = False
    if not intact:
        raise CorruptData(f"{what}'s checksum is wrong: it was changed or damaged; publish it again")
    return body


def exactly(value: Any, fields: Iterable[str], what: str) -> Mapping[str, Any]:
    """`value` itself if it is a mapping with just these fields; otherwise `CorruptData` naming the difference."""
    if not isinstance(value, Mapping):
        raise CorruptData(f"{what} must be a mapping, not {type(value).__name__}")
    expected = set(fields)
    missing, unknown = sorted(expected - set(value)), sorted(set(value) - expected)
    if missing:
        raise CorruptData(f"{what} lacks the field {', '.join(missing)}; publish it again")
    if unknown:
        raise CorruptData(f"{what} has the unknown field {', '.join(unknown)}; publish it again")
    return value
