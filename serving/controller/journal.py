"""The truth about every request: prompt, parameters and committed tokens, in SQLite.

Records are committed in groups by one writer thread; a token may be delivered once its commit is
done. WAL with synchronous=NORMAL survives any end of the process. A reserve table is given up when
the disk is full, so that admitted streams finish while new requests are refused.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from data.errors import CorruptData
from serving.errors import PerennialError
from serving.requests import FinishReason, GenerationRequest, TopLogprob

logger = logging.getLogger(__name__)

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, body BLOB NOT NULL, admitted REAL NOT NULL, finish TEXT);
CREATE TABLE IF NOT EXISTS tokens (
    key INTEGER NOT NULL, start INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (key, start)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reserve (space BLOB);
"""


class JournalFull(PerennialError):
    """There is no room for this record."""


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive tokens of one request, as stored."""

    tokens: list[int]
    logprobs: list[float]
    top: list[list[TopLogprob]]


@dataclass(frozen=True, slots=True)
class StoredRequest:
    """A request as the journal knows it; `admitted` is Unix time."""

    key: int
    request: GenerationRequest
    admitted: float
    finish: FinishReason | None
    output: Segment


@dataclass(frozen=True, slots=True)
class _Statement:
    sql: str
    rows: Sequence[tuple[object, ...]]


class Journal:
    """One SQLite file and its writer thread. Methods are called from the event loop."""

    def __init__(self, path: str, *, reserve_bytes: int = 1 << 20, max_bytes: int = 0) -> None:
        """Open or create; raises `CorruptData` for a file that is no journal or is from a newer version."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._path, self._reserve_bytes = path, reserve_bytes
        self._queue: queue.SimpleQueue[tuple[list[_Statement], asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._open(max_bytes)
        except sqlite3.DatabaseError as error:
            raise CorruptData(f"{path} is not a usable journal ({error}); move it away to start a new one") from error
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def _open(self, max_bytes: int) -> None:
        database = self._database
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        if max_bytes:
            page = database.execute("PRAGMA page_size").fetchone()[0]
            database.execute(f"PRAGMA max_page_count={max_bytes // page}")
        database.executescript(_SCHEMA)
        version = self.meta("schema", _SCHEMA_VERSION)
        if version > _SCHEMA_VERSION:
            raise CorruptData(f"{self._path} was written by a newer version (schema {version}); upgrade to read it")
        self._set_meta("schema", _SCHEMA_VERSION)
        self._fill_reserve()

    def meta(self, name: str, default: int) -> int:
        """A stored number."""
        row = self._database.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return int(row[0]) if row else default

    def _set_meta(self, name: str, value: int) -> None:
        self._database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def _fill_reserve(self) -> None:
        try:
            if not self._database.execute("SELECT 1 FROM reserve").fetchone():
                self._database.execute("INSERT INTO reserve VALUES (zeroblob(?))", (self._reserve_bytes,))
        except sqlite3.OperationalError:
            logger.warning("no room for the journal's reserve at %s", self._path)

    @property
    def reserved(self) -> bool:
        """Whether the reserve is intact: without it no new request should be admitted."""
        return self._database.execute("SELECT 1 FROM reserve").fetchone() is not None

    # -- reading at start -------------------------------------------------------------------------

    def load(self, finished: int) -> list[StoredRequest]:
        """All unfinished requests and the `finished` latest ones, oldest first."""
        rows = self._database.execute(
            "SELECT key, body, admitted, finish FROM requests WHERE finish IS NULL UNION SELECT * FROM "
            "(SELECT key, body, admitted, finish FROM requests WHERE finish IS NOT NULL ORDER BY key DESC LIMIT ?) "
            "ORDER BY key",
            (finished,),
        ).fetchall()
        return [self._stored(*row) for row in rows]

    def _stored(self, key: int, body: bytes, admitted: float, finish: FinishReason | None) -> StoredRequest:
        output = Segment([], [], [])
        rows = self._database.execute("SELECT start, body FROM tokens WHERE key=? ORDER BY start", (key,))
        for start, segment_body in rows:
            segment = msgspec.msgpack.decode(segment_body, type=Segment)
            if start != len(output.tokens):
                raise CorruptData(f"{self._path}: request {key} has tokens missing before position {start}")
            output.tokens.extend(segment.tokens)
            output.logprobs.extend(segment.logprobs)
            output.top.extend(segment.top)
        return StoredRequest(key, msgspec.msgpack.decode(body, type=GenerationRequest), admitted, finish, output)

    # -- writing ----------------------------------------------------------------------------------

    async def admit(self, key: int, request: GenerationRequest, admitted: float) -> None:
        """Store a new request. Raises `JournalFull`."""
        if not self.reserved:
            raise JournalFull("the journal's disk is full")
        row = (key, request.request_id, msgspec.msgpack.encode(request), admitted)
        await self._submit([_Statement("INSERT INTO requests VALUES (?, ?, ?, ?, NULL)", [row])])

    async def commit(
        self, tokens: Sequence[tuple[int, int, Segment]], finished: Sequence[tuple[int, FinishReason]]
    ) -> None:
        """Store new tokens `(key, start, segment)` and ends. Raises `JournalFull`."""
        rows = [(key, start, msgspec.msgpack.encode(segment)) for key, start, segment in tokens]
        statements = [_Statement("INSERT INTO tokens VALUES (?, ?, ?)", rows)] if rows else []
        if finished:
            ends = [(reason, key) for key, reason in finished]
            statements.append(_Statement("UPDATE requests SET finish=? WHERE key=?", ends))
        await self._submit(statements)

    async def set_meta(self, name: str, value: int) -> None:
        """Store a number."""
        await self._submit([_Statement("INSERT OR REPLACE INTO meta VALUES (?, ?)", [(name, value)])])

    async def forget(self, keys: Sequence[int]) -> None:
        """Delete requests and their tokens."""
        rows = [(key,) for key in keys]
        statements = [_Statement(f"DELETE FROM {table} WHERE key=?", rows) for table in ("tokens", "requests")]
        await self._submit(statements)

    async def _submit(self, statements: list[_Statement]) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((statements, future))
        await future

    def _write(self) -> None:
        while True:
            group = [self._queue.get()]
            while not self._queue.empty():
                group.append(self._queue.get())
            entries = [entry for entry in group if entry is not None]
            failures = self._commit_group(entries)
            self._loop.call_soon_threadsafe(_resolve, entries, failures)
            if len(entries) < len(group):
                return

    def _commit_group(self, entries: Sequence[tuple[list[_Statement], asyncio.Future[None]]]) -> list[Exception | None]:
        """All in one transaction; if that fails, each in its own, giving up the reserve if need be."""
        try:
            self._transaction([statement for statements, _ in entries for statement in statements])
            return [None] * len(entries)
        except sqlite3.Error:
            return [self._commit_alone(statements) for statements, _ in entries]

    def _commit_alone(self, statements: list[_Statement]) -> Exception | None:
        for last_try in (False, True):
            try:
                self._transaction(statements)
                return None
            except sqlite3.OperationalError as error:
                if last_try or any("INTO requests" in statement.sql for statement in statements):
                    return JournalFull(f"the journal at {self._path} takes no more: {error}")
                logger.error("the journal's disk is full; giving up its reserve so that running streams can end")
                self._database.execute("DELETE FROM reserve")
            except sqlite3.Error as error:
                return CorruptData(f"the journal at {self._path} refused a record: {error}")
        return None

    def _transaction(self, statements: Sequence[_Statement]) -> None:
        self._database.execute("BEGIN")
        try:
            for statement in statements:
                self._database.executemany(statement.sql, statement.rows)
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Write what is queued and close."""
        self._queue.put(None)
        self._thread.join(10.0)
        self._database.close()


def _resolve(
    entries: Sequence[tuple[list[_Statement], asyncio.Future[None]]], failures: Sequence[Exception | None]
) -> None:
    for (_, future), failure in zip(entries, failures, strict=True):
        if future.done():
            continue
        if failure is None:
            future.set_result(None)
        else:
            future.set_exception(failure)
