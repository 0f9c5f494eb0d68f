"""Keeps copies of other workers' KV in host memory: one log per rank of a replica, appended by its stream."""

from __future__ import annotations

import contextlib
import hmac
import logging
import queue
import socket
import threading
from collections.abc import Sequence
from itertools import count

from torch import Tensor

from serving.engine.blocks import BlockAllocator, blocks_for
from serving.engine.kv_cache import KvCache, slots_of, within
from serving.errors import TransportError
from serving.messages import Holding
from serving.worker import kv_wire as wire
from serving.worker.checksum import checksum
from serving.worker.groups import GroupBroken

logger = logging.getLogger(__name__)

_GREETING_BYTES = 4096
_FRAME_BYTES = 256 << 20
_NUMBERS = count(1)  # of block tables, in all logs
_SILENCE_S = 5.0  # for a greeting; afterwards a stream may have nothing to say for long
_AHEAD = 16  # blocks whose memory is there before they are needed, beside one for each sequence
_TAKEN_BYTES = 2 << 20  # of memory at once: whoever maps or unmaps some waits meanwhile, perhaps with the interpreter


class KvLog:
    """The KV of one rank: block tables over a cache in host memory. Tokens of a sequence are appended in order."""

    def __init__(self, greeting: wire.Greeting) -> None:
        self.replica, self.layers, self.heads = greeting.replica, greeting.layers, greeting.heads
        self.cache = KvCache(
            greeting.layers,
            greeting.heads,
            greeting.head_dim,
            greeting.blocks,
            greeting.block_tokens,
            wire.dtype_of(greeting.dtype),
            "cpu",
            log=True,
        )
        self._allocator = BlockAllocator(greeting.blocks)
        self._tables: dict[int, list[int]] = {}
        self._numbers: dict[int, int] = {}  # of tables
        self._tokens: dict[int, int] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._reach = self._populated = 0  # blocks from the first one on: that were ever in use, whose memory is there

    def close(self) -> None:
        """Nothing is appended from now on."""
        with self._lock:
            self._closed = True

    def append(self, frame: wire.Frame, body: Tensor) -> None:
        """Take a frame. Raises `TransportError` if it is damaged, or continues what is not here."""
        if checksum(body) != frame.crc:
            raise TransportError(f"frame {frame.number} arrived damaged")
        with self._lock:
            if self._closed:
                raise TransportError("the copy is of no use any more")
            for key in frame.ended:
                self._forget(key)
            tables = [(self._table(*span), *span[1:]) for span in frame.spans]
            if tables:
                slots = slots_of(tables, self.cache.block_tokens)
                self.cache.unpack(slots, body.view(self.cache.dtype).view(self._shape(len(slots))))
            self._tokens |= {key: stop for key, _, stop in frame.spans}

    @property
    def short(self) -> bool:
        """Whether memory should be taken: sequences often need a new block all at once, and steps wait for that."""
        return self._populated < min(self._reach + len(self._tables) + _AHEAD, self._allocator.blocks)

    def populate(self) -> None:
        """Take memory for the blocks that will be needed next. For one thread, which others need not wait for."""
        while not self._closed and self.short:
            self._populated += self.cache.populate(self._populated, _TAKEN_BYTES)

    def _shape(self, tokens: int) -> tuple[int, ...]:
        layers, heads = self.layers[1] - self.layers[0], self.heads[1] - self.heads[0]
        return tokens, layers, 2, heads, self.cache.head_dim

    def _table(self, key: int, start: int, stop: int) -> list[int]:
        """The block table of a sequence, with room until `stop`."""
        if start == 0:
            self._forget(key)
        if not 0 <= start <= self._tokens.get(key, 0) or start >= stop:
            raise TransportError(f"tokens {start} to {stop} of sequence {key} do not continue what is kept of it")
        if key not in self._tables:
            self._tables[key], self._numbers[key] = [], next(_NUMBERS)
        table = self._tables[key]
        missing = blocks_for(stop, self.cache.block_tokens) - len(table)
        if missing > 0:
            if not self._allocator.can_allocate(missing):
                raise TransportError("the log is full")
            table += self._allocator.allocate(missing)
            self._reach = max(self._reach, *(block + 1 for block in table))
        return table

    def _forget(self, key: int) -> None:
        self._tokens.pop(key, None)
        self._numbers.pop(key, None)
        self._allocator.free(self._tables.pop(key, []))

    def holdings(self) -> list[Holding]:
        """What is kept, by sequence."""
        with self._lock:
            return [
                Holding(
                    self.replica,
                    key,
                    tokens,
                    self.layers,
                    self.heads,
                    True,
                    list(self._tables[key]),
                    self._numbers[key],
                )
                for key, tokens in self._tokens.items()
            ]


class Keeper:
    """Listens on `host` for streams that know `token`."""

    def __init__(self, host: str, token: str) -> None:
        self._token = token
        self._logs: dict[tuple[int, tuple[int, int], tuple[int, int]], KvLog] = {}
        self._frozen: set[int] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server((host, 0))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self._short: queue.SimpleQueue[KvLog | None] = queue.SimpleQueue()
        for work in (self._accept, self._populate):
            threading.Thread(target=work, name="keeper", daemon=True).start()

    def cache(self, replica: int, layers: tuple[int, int], heads: tuple[int, int]) -> KvCache:
        """The cache of a log that holds these ranges. Raises `GroupBroken` if it was dropped."""
        with self._lock:
            for log in self._logs.values():
                if log.replica == replica and within(layers, log.layers) and within(heads, log.heads):
                    return log.cache
        raise GroupBroken(f"the copy of replica {replica} is not here any more")

    def holdings(self, replicas: Sequence[int]) -> list[Holding]:
        """What is kept of these replicas."""
        with self._lock:
            logs = [log for log in self._logs.values() if log.replica in replicas]
        return [one for log in logs for one in log.holdings()]

    def freeze(self, replicas: Sequence[int]) -> None:
        """Take nothing more of these replicas, from streams that are here or still come."""
        with self._lock:
            self._frozen.update(replicas)
            logs = [log for log in self._logs.values() if log.replica in self._frozen]
        for log in logs:
            log.close()

    def drop_others(self, replicas: Sequence[int]) -> None:
        """Give the memory of all other logs back."""
        with self._lock:
            self._frozen &= set(replicas)
            dropped = [log for log in self._logs.values() if log.replica not in replicas]
            self._logs = {key: log for key, log in self._logs.items() if log.replica in replicas}
        if dropped:
            threading.Thread(target=_give_back, args=(dropped,), name="give-back", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()
        self._short.put(None)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), name="kept-stream", daemon=True).start()

    def _populate(self) -> None:
        while (log := self._short.get()) is not None:
            log.populate()
            del log  # it may be large

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                log, room = self._greet(connection), wire.Room()
                while True:
                    frame, body = wire.receive(connection, wire.Frame, most_bytes=_FRAME_BYTES, room=room)
                    log.append(frame, body)
                    wire.send(connection, wire.Answer(frame.number))
                    if log.short:
                        self._short.put(log)
            except TransportError as error:
                with contextlib.suppress(OSError):
                    wire.send(connection, wire.Answer(-1, str(error)))
                logger.info("a stream of KV ended: %s", error)
            except OSError as error:
                logger.info("a stream of KV ended: %s", error)

    def _greet(self, connection: socket.socket) -> KvLog:
        connection.settimeout(_SILENCE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        greeting, _ = wire.receive(connection, wire.Greeting, most_bytes=0, head_bytes=_GREETING_BYTES)
        if not hmac.compare_digest(greeting.token.encode(), self._token.encode()):
            raise TransportError("wrong join token")
        connection.settimeout(None)
        log = KvLog(greeting)
        with self._lock:
            if log.replica in self._frozen:
                raise TransportError(f"replica {log.replica} has ended, and its copy is being read")
            self._logs[log.replica, log.layers, log.heads] = log
        wire.send(connection, wire.Answer(0))
        return log


def _give_back(logs: list[KvLog]) -> None:
    """Return the memory of logs that nobody reads any more."""
    for log in logs:
        log.close()
        log.cache.give_back()
