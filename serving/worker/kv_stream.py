"""Sends the KV of one rank, as it grows, to the worker that keeps a copy.

The cache itself is the buffer: KV is a log per sequence, so whatever was computed and not sent yet can
be read at any time later. What decoding adds goes first. Of the rest only two frames are under way, which begin
early in a step: steps wait for tokens, and those must not wait for a prompt. What is sent was computed before the
step that the device is at, so the work falls into the time in which the step loop waits for the device.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from serving.engine.batch import StepPlan
from serving.engine.kv_cache import KvCache, slots_of
from serving.engine.kv_index import Cached, Kept, KvIndex, Look, Mark
from serving.engine.own_stream import own_stream
from serving.errors import TransportError
from serving.worker import kv_wire as wire
from serving.worker.checksum import as_bytes, checksum

logger = logging.getLogger(__name__)

_CONNECT_S = 2.0
_QUIET_S = 0.05  # how long to wait for something new before looking whether to stop
_AGAIN_S = 0.5  # between two attempts to connect
_WINDOW = 8  # frames that may be unanswered
_LONG_WINDOW = 2  # of these, frames of which steps do not wait
_LONG_S = 0.05  # that one is expected to take before any did
_FORGETTING = 0.9  # what is left of the longest time that a long frame took when the next one was quicker
_SHORT_TOKENS = 8  # of a sequence: more is a prompt, or what was here before the copy
_PATIENCE_S = 0.5  # how long a step, or a frame, waits for answers; a keeper that is slower holds nobody up


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of a sequence that are sent next, and what is known of it."""

    key: int
    start: int
    stop: int
    cached: Cached

    @property
    def long(self) -> bool:
        """Whether it is more than a short tail."""
        return self.stop - self.start > _SHORT_TOKENS


def next_spans(cached: dict[int, Cached], sent: dict[int, Cached], most_tokens: int) -> list[Span]:
    """What to send next, of `cached` and not yet `sent` tokens, `most_tokens` in all: short tails if there are any."""
    tails = [
        Span(key, start, one.tokens, one)
        for key, one in cached.items()
        if (start := _sent_tokens(sent.get(key), one)) < one.tokens
    ]
    spans: list[Span] = []
    room = most_tokens
    short = [span for span in tails if not span.long]
    for span in short or sorted(tails, key=lambda span: (span.stop - span.start, span.key)):
        stop = min(span.stop, span.start + room)
        if stop > span.start:
            spans.append(Span(span.key, span.start, stop, span.cached))
            room -= stop - span.start
    return spans


def _sent_tokens(sent: Cached | None, now: Cached) -> int:
    return sent.tokens if sent is not None and sent.life == now.life else 0


class KvStream(threading.Thread):
    """The stream of one rank of `replica` to the keeper at `address`. Ends with `stop`; survives a lost connection."""

    def __init__(
        self,
        address: str,
        token: str,
        replica: int,
        cache: KvCache,
        index: KvIndex,
        *,
        frame_bytes: int,
        tell: Callable[[bool], None] = lambda complete: None,
    ) -> None:
        super().__init__(name=f"kv-stream-{replica}", daemon=True)
        self._address, self._token, self._replica = address, token, replica
        self._cache, self._index = cache, index
        self._tell = tell
        self._told: tuple[int, bool] | None = None
        layers, heads = cache.layers[1] - cache.layers[0], cache.heads[1] - cache.heads[0]
        token_bytes = 2 * layers * heads * cache.head_dim * cache.dtype.itemsize
        self._frame_tokens = max(1, frame_bytes // token_bytes)
        self._sent: dict[int, Cached] = {}
        self._unanswered: dict[int, tuple[list[Span], list[int]]] = {}  # spans and ended sequences by frame
        self._kept: dict[int, Kept] = {}
        self._long: dict[int, float] = {}  # when those frames under way were begun that are not of short tails
        self._long_s = _LONG_S  # that such frames took lately
        self._answered = threading.Condition()
        self._connection: socket.socket | None = None
        self._stopped = False
        self._numbers = 0

    # -- from other threads ---------------------------------------------------------------------------

    def stop(self) -> None:
        """End the stream; the copy stays where it is."""
        self._stopped = True
        self._hang_up()

    def hold(self, plan: StepPlan, lag_tokens: int) -> None:
        """Wait until the copy of every decoding sequence of `plan` is at most `lag_tokens` behind.

        Who was there before the copy began is not waited for until it is complete, and nobody while there is
        no connection. A keeper that says nothing for half a second holds up one step, not those after it.
        """
        wanted = {one.key: one.start - lag_tokens for one in plan.sequences if len(one.tokens) == 1}
        until = time.monotonic() + _PATIENCE_S
        with self._answered:
            while self._connection is not None and (late := self._index.late(wanted, self._kept)):
                self._index.nudge(hurry=True)
                if not self._answered.wait(until - time.monotonic()):
                    self._index.start_over(late)
                    return

    # -- the thread -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Stream until stopped; connect again when the connection is lost."""
        with torch.inference_mode(), self._side_stream():
            while not self._stopped:
                try:
                    self._stream()
                except (OSError, TransportError) as error:
                    if not self._stopped:
                        logger.info("no copies of replica %d at %s: %s", self._replica, self._address, error)
                self._hang_up()
                if not self._stopped:
                    self._index.start_over()
                    self._report()
                    time.sleep(_AGAIN_S)

    def _side_stream(self) -> contextlib.AbstractContextManager[object]:
        if self._cache.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.cuda.stream(own_stream(self, self._cache.device))

    def _stream(self) -> None:
        connection = self._connect()
        reader = threading.Thread(target=self._read, args=(connection,), name="kv-answers", daemon=True)
        reader.start()
        quiet = False
        while not self._stopped and reader.is_alive():
            self._report()
            look = self._index.look(all_of_it=quiet)
            ended = [key for key in self._sent if key not in look.cached]
            spans = next_spans(look.cached, self._sent, self._frame_tokens)
            if any(span.long for span in spans) and not self._has_time(look):
                spans = []
            if spans or ended:
                self._send(connection, spans, ended, look.mark)
                quiet = False
            else:
                quiet = not self._index.wait(look.changes, _QUIET_S)

    def _has_time(self, look: Look) -> bool:
        """Whether another long frame may begin."""
        return len(self._long) < _LONG_WINDOW and look.tempo.early(time.monotonic(), self._long_s)

    def _connect(self) -> socket.socket:
        host, _, port = self._address.rpartition(":")
        connection = socket.create_connection((host, int(port)), timeout=_CONNECT_S)
        try:
            self._greet(connection)
        except BaseException:
            connection.close()
            raise
        with self._answered:
            self._sent, self._unanswered, self._kept = {}, {}, {}
            self._long = {}
            self._index.start_over()
            self._connection = connection
        return connection

    def _greet(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        cache = self._cache
        dtype = str(cache.dtype).removeprefix("torch.")
        wire.send(
            connection,
            wire.Greeting(
                self._token,
                self._replica,
                cache.layers,
                cache.heads,
                cache.head_dim,
                cache.blocks,
                cache.block_tokens,
                dtype,
            ),
        )
        answer, _ = wire.receive(connection, wire.Answer, most_bytes=0)
        if answer.refusal:
            raise TransportError(answer.refusal)
        connection.settimeout(None)

    def _report(self) -> None:
        """Say it when the copy has become complete, or is not complete any more."""
        with self._answered:
            now, before = self._index.copying, self._told
            self._told = now
            if now != before:  # two threads come here, and what is said last must be what is so
                self._tell(now[1])

    def _send(self, connection: socket.socket, spans: list[Span], ended: list[int], mark: Mark | None) -> None:
        began_s = time.monotonic()
        data = self._load(spans, mark) if spans else None
        if not self._index.unchanged((span.key, span.cached) for span in spans):
            return  # blocks may have been given to somebody else while they were read
        body = as_bytes(data) if data is not None else None
        self._numbers += 1
        with self._answered:
            self._unanswered[self._numbers] = spans, ended
            if any(span.long for span in spans):
                self._long[self._numbers] = began_s
            while len(self._unanswered) > _WINDOW and self._connection is connection:
                self._answered.wait(_PATIENCE_S)
        frame = [(span.key, span.start, span.stop) for span in spans]
        wire.send(connection, wire.Frame(self._numbers, frame, ended, checksum(body) if body else 0), body)
        for key in ended:
            del self._sent[key]
        for span in spans:
            self._sent[span.key] = Cached(span.stop, (), span.cached.life)

    def _load(self, spans: list[Span], mark: Mark | None) -> Tensor:
        """What the device has once it is past `mark`. This thread waits for that: a stream that waits on the device
        keeps others back that share its queue, and behind a lost peer for ever.
        """
        tables = ((span.cached.blocks, span.start, span.stop) for span in spans)
        slots = slots_of(tables, self._cache.block_tokens).to(self._cache.device)
        if mark is not None:
            mark.synchronize()
        data = self._cache.pack(slots)
        if data.device.type == "cpu":
            return data
        pinned = torch.empty(data.shape, dtype=data.dtype, pin_memory=True)
        pinned.copy_(data, non_blocking=True)
        torch.cuda.current_stream(self._cache.device).synchronize()
        return pinned

    def _read(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, TransportError):
            while True:
                answer, _ = wire.receive(connection, wire.Answer, most_bytes=0)
                if answer.refusal:
                    logger.warning("the keeper of replica %d: %s", self._replica, answer.refusal)
                    break
                with self._answered:
                    spans, ended = self._unanswered.pop(answer.number, ((), ()))
                    if (began_s := self._long.pop(answer.number, None)) is not None:
                        self._long_s = max(time.monotonic() - began_s, _FORGETTING * self._long_s)
                        self._index.nudge()
                    self._kept |= {span.key: Kept(span.cached.life, span.stop) for span in spans}
                    for key in ended:
                        self._kept.pop(key, None)
                    self._index.follow(self._kept)
                    self._answered.notify_all()
                self._report()
        self._hang_up()

    def _hang_up(self) -> None:
        with self._answered:
            connection, self._connection = self._connection, None
            self._answered.notify_all()
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
