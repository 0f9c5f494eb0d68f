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
