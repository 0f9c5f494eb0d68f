"""What a service was asked for lately, as its journal has it: read beside the service, which goes on writing."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import msgspec

from data.errors import CorruptData
from serving.controller.journal import Segment
from serving.requests import GenerationRequest

_MAGIC = b"SQLite format 3\0"
_LOCKED_S = 5.0

Asked = tuple[float, str, int, int]
"""Unix time of the admission, model, tokens in, tokens out (so far)."""


def is_journal(path: str | os.PathLike[str]) -> bool:
    """Whether a file is meant to be a journal."""
    with Path(path).open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def read_journal(path: str | os.PathLike[str]) -> list[Asked]:
    """Every request that the journal still holds, in order of admission. What was refused is not among them.

    Raises `CorruptData`.
    """
    try:
        database = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True, timeout=_LOCKED_S)
        try:
            requests = database.execute("SELECT key, body, admitted FROM requests ORDER BY key").fetchall()
            outputs = _lengths(database)
        finally:
            database.close()
        decode = msgspec.msgpack.Decoder(GenerationRequest).decode
        return [_asked(decode(body), admitted, outputs.get(key, 0)) for key, body, admitted in requests]
    except (sqlite3.Error, msgspec.MsgspecError) as error:
        raise CorruptData(f"{path} is not a usable journal ({error}); name that of a service") from error


def _lengths(database: sqlite3.Connection) -> dict[int, int]:
    """Delivered tokens by request."""
    decode = msgspec.msgpack.Decoder(Segment).decode
    last = "SELECT key, start, body FROM tokens WHERE row IN (SELECT max(row) FROM tokens GROUP BY key)"
    return {key: start + len(decode(body).tokens) for key, start, body in database.execute(last)}


def _asked(request: GenerationRequest, admitted: float, output: int) -> Asked:
    return admitted, request.model, max(len(request.prompt), 1), max(output, 1)
