"""The truth about every request: prompt, parameters and committed tokens, in SQLite.

Records are committed in groups by one writer thread; a token may be delivered once its commit is
done. WAL with synchronous=NORMAL survives any end of the process. A reserve is given up when the
disk is full, so that admitted streams finish while new requests are refused.

Tokens lie in the order of their commits, so that a commit of many streams writes one page or two; by
request it would be a page for each. Reading is one scan, and forgetting a scan of the oldest rows.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from data.errors import CorruptData, InvalidInput
from serving.controller.reserve import Reserve
from serving.errors import PerennialError
from serving.requests import FinishReason, GenerationRequest, TopLogprob

logger = logging.getLogger(__name__)

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS requests (
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, body BLOB NOT NULL, admitted REAL NOT NULL, finish TEXT,
    last_row INTEGER);
CREATE TABLE IF NOT EXISTS tokens (
    row INTEGER PRIMARY KEY, key INTEGER NOT NULL, start INTEGER NOT NULL, body BLOB NOT NULL);
"""
_LOAD = """
SELECT key, body, admitted, finish FROM requests WHERE finish IS NULL UNION SELECT * FROM
    (SELECT key, body, admitted, finish FROM requests WHERE finish IS NOT NULL ORDER BY key DESC LIMIT ?) ORDER BY key
"""
_SURPLUS = "(SELECT key FROM requests WHERE finish IS NOT NULL ORDER BY key DESC LIMIT -1 OFFSET ?)"
_END = "UPDATE requests SET finish=?, last_row=(SELECT max(row) FROM tokens) WHERE key=?"
_LOG_PAGES, _SHORT_LOG_PAGES = 1000, 16  # of the WAL before it is used from its beginning again
_ROWS = 256  # of one INSERT: every statement lets go of the interpreter lock, and must get it back


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
    rows: Sequence[Sequence[object]]


_Entry = tuple[list[_Statement], asyncio.Future[None]]


class Journal:
    """One SQLite file and its writer thread. Methods are called from the event loop."""

    def __init__(self, path: str, *, reserve_bytes: int = 1 << 20, max_bytes: int = 0) -> None:
        """Open or create, with at most `max_bytes` (0: as many as the disk has), the reserve included.

        Raises `CorruptData` for a file that is no journal or is from a newer version, `InvalidInput` if
        it cannot be written or another controller uses it.
        """
        self._path, self._reserve_bytes, self._max_bytes = path, reserve_bytes, max_bytes
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(f"{path}-lock")
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise InvalidInput(f"cannot write the journal {path}: {error}; choose another path") from error
        try:
            self._open()
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def _open(self) -> None:
        try:
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.executescript(_SCHEMA)
            version = self.meta("schema", _SCHEMA_VERSION)
            self._database.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (_SCHEMA_VERSION,))
        except sqlite3.OperationalError as error:
            raise InvalidInput(f"cannot write the journal {self._path}: {error}; free some space") from error
        except sqlite3.DatabaseError as error:
            raise self._corrupt(error) from error
        if version > _SCHEMA_VERSION:
            raise CorruptData(f"{self._path} was written by a newer version (schema {version}); upgrade to read it")
        self._reserve = Reserve(Path(f"{self._path}-reserve"), self._reserve_bytes)
        self._limit()
        self._take_reserve()

    def _corrupt(self, error: Exception) -> CorruptData:
        return CorruptData(f"{self._path} is not a usable journal ({error}); move it away to start a new one")

    def _number(self, pragma: str) -> int:
        return int(self._database.execute(f"PRAGMA {pragma}").fetchone()[0])

    def _limit(self) -> None:
        if self._max_bytes:
            most_bytes = self._max_bytes - self._reserve.held * self._reserve_bytes
            self._database.execute(f"PRAGMA max_page_count={most_bytes // self._number('page_size')}")

    def _take_reserve(self) -> None:
        """Have the reserve, if as much again stays free: otherwise it would be given up at once."""
        if not self._reserve.held and self._free_bytes() >= 2 * self._reserve_bytes:
            self._reserve.take()
            self._limit()
            self._database.execute(f"PRAGMA wal_autocheckpoint={_LOG_PAGES}")

    def _give_up_reserve(self) -> None:
        """Make room, and keep the WAL from taking it: it would hold every page of every commit."""
        self._reserve.give_up()
        self._limit()
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._database.execute(f"PRAGMA wal_autocheckpoint={_SHORT_LOG_PAGES}")

    def _free_bytes(self) -> int:
        disk = os.statvfs(Path(self._path).parent)
        free = disk.f_bavail * disk.f_frsize
        if self._max_bytes:
            used = (self._number("page_count") - self._number("freelist_count")) * self._number("page_size")
            free = min(free, self._max_bytes - used)
        return free

    def meta(self, name: str, default: int) -> int:
        """A stored number."""
        row = self._database.execute("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return int(row[0]) if row else default

    # -- reading at start -------------------------------------------------------------------------

    def load(self, finished: int) -> list[StoredRequest]:
        """All unfinished requests and the `finished` latest ones, oldest first."""
        try:
            rows = self._database.execute(_LOAD, (finished,)).fetchall()
            outputs = self._outputs({key for key, *_ in rows})
            decode = msgspec.msgpack.Decoder(GenerationRequest).decode
            return [StoredRequest(key, decode(body), admitted, end, outputs[key]) for key, body, admitted, end in rows]
        except (sqlite3.Error, msgspec.MsgspecError) as error:
            raise self._corrupt(error) from error

    def _outputs(self, keys: Collection[int]) -> dict[int, Segment]:
        """All tokens of each of these requests."""
        outputs = {key: Segment([], [], []) for key in keys}
        decode = msgspec.msgpack.Decoder(Segment).decode
        for key, start, body in self._database.execute("SELECT key, start, body FROM tokens ORDER BY row"):
            if key not in outputs:
                continue
            output, segment = outputs[key], decode(body)
            if start != len(output.tokens):
                raise CorruptData(f"{self._path}: request {key} has tokens missing before position {start}")
            output.tokens.extend(segment.tokens)
            output.logprobs.extend(segment.logprobs)
            output.top.extend(segment.top)
        return outputs

    # -- writing ----------------------------------------------------------------------------------

    async def admit(self, key: int, request: GenerationRequest, admitted: float) -> None:
        """Store a new request. Raises `JournalFull`."""
        if not self._reserve.held:
            await self._submit([])  # the writer looks for space again
        if not self._reserve.held:
            raise JournalFull(f"the disk of the journal {self._path} is full")
        row = (key, request.request_id, msgspec.msgpack.encode(request), admitted)
        await self._submit([_Statement("INSERT INTO requests VALUES (?, ?, ?, ?, NULL, NULL)", [row])])

    def withdraw(self, key: int) -> None:
        """Delete a request whose admission nobody waits for any more."""
        self._enqueue([_Statement("DELETE FROM requests WHERE key=?", [(key,)])]).add_done_callback(_ignore)

    async def commit(
        self, tokens: Sequence[tuple[int, int, Segment]], finished: Sequence[tuple[int, FinishReason]]
    ) -> None:
        """Store new tokens `(key, start, segment)` and ends. Raises `JournalFull`."""
        rows = [(key, start, msgspec.msgpack.encode(segment)) for key, start, segment in tokens]
        statements = [_insert(rows[at : at + _ROWS]) for at in range(0, len(rows), _ROWS)]
        if finished:
            ends = [(reason, key) for key, reason in finished]
            statements.append(_Statement(_END, ends))
        await self._submit(statements)

    async def set_meta(self, name: str, value: int) -> None:
        """Store a number."""
        await self._submit([_Statement("INSERT OR REPLACE INTO meta VALUES (?, ?)", [(name, value)])])

    def trim(self, finished: int) -> None:
        """Delete the finished requests that `load` leaves out. Nobody waits for it."""
        tables = ("tokens", "requests")
        statements = [_Statement(f"DELETE FROM {one} WHERE key IN {_SURPLUS}", [(finished,)]) for one in tables]
        self._enqueue(statements).add_done_callback(_ignore)

    async def forget(self, keys: Sequence[int]) -> None:
        """Delete finished requests and their tokens; at most some thousand at a time."""
        chosen = f"({', '.join('?' * len(keys))})"
        reach = f"(SELECT max(last_row) FROM requests WHERE key IN {chosen})"
        tokens = _Statement(f"DELETE FROM tokens WHERE row <= {reach} AND key IN {chosen}", [[*keys, *keys]])
        requests = _Statement(f"DELETE FROM requests WHERE key IN {chosen}", [keys])
        await self._submit([tokens, requests])

    async def _submit(self, statements: list[_Statement]) -> None:
        await self._enqueue(statements)

    def _enqueue(self, statements: list[_Statement]) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((statements, future))
        return future

    def _write(self) -> None:
        while True:
            group = [self._queue.get()]
            while not self._queue.empty():
                group.append(self._queue.get())
            entries = [entry for entry in group if entry is not None]
            self._take_reserve()
            failures = self._commit_group(entries)
            self._loop.call_soon_threadsafe(_resolve, entries, failures)
            if len(entries) < len(group):
                return

    def _commit_group(self, entries: Sequence[_Entry]) -> list[Exception | None]:
        """All in one transaction; if that fails, each in its own, giving up the reserve if need be."""
        try:
            self._transaction([statement for statements, _ in entries for statement in statements])
            return [None] * len(entries)
        except Exception:  # noqa: BLE001 - who is to blame shows when each goes alone
            return [self._commit_alone(statements) for statements, _ in entries]

    def _commit_alone(self, statements: list[_Statement]) -> Exception | None:
        admission = any("INTO requests" in statement.sql for statement in statements)
        try:
            try:
                self._transaction(statements)
            except sqlite3.OperationalError:
                if admission or not self._reserve.held:
                    raise
                logger.error("the journal's disk is full; giving up its reserve so that running streams can end")
                self._give_up_reserve()
                self._transaction(statements)
        except sqlite3.OperationalError as error:
            return JournalFull(f"the journal at {self._path} takes no more: {error}")
        except Exception as error:  # noqa: BLE001 - the writer must outlive whatever it is given
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
        self._release()

    def _release(self) -> None:
        self._database.close()
        self._lock.close()


def _locked(path: str) -> IO[bytes]:
    """A file that nobody else has locked; the lock ends with it, or with the process."""
    file = open(path, "wb")  # noqa: SIM115 - stays open as long as the journal
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OSError("another controller uses it") from error
    return file


def _insert(rows: Sequence[tuple[int, int, bytes]]) -> _Statement:
    places = ", ".join(["(?, ?, ?)"] * len(rows))
    sql = f"INSERT INTO tokens (key, start, body) VALUES {places}"
    return _Statement(sql, [[value for row in rows for value in row]])


def _resolve(entries: Sequence[_Entry], failures: Sequence[Exception | None]) -> None:
    for (_, future), failure in zip(entries, failures, strict=True):
        if future.done():
            continue
        if failure is None:
            future.set_result(None)
        else:
            future.set_exception(failure)


def _ignore(done: asyncio.Future[None]) -> None:
    if not done.cancelled():
        done.exception()
