"""The Python client: streams that survive connections and servers, and the control calls."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from typing import Any, Self

import grpc

from serving.api import translate
from serving.api.connection import Backoff, Connection, Target
from serving.api.generated import control_pb2, inference_pb2
from serving.api.status import from_call
from serving.errors import Aborted, BrokenStream, DeadlineExceeded, InvalidInput, QueueFull, TransportError, Unavailable
from serving.requests import Chunk, Event, Limits, Sampling, ServerInfo

_DEADLINE_MARGIN_S = 2.0  # the server's own verdict, with the partial answer, should come first


class Client:
    """Talks to a Perennial server; errors are those of `serving.errors`.

    `target` is an address, several that are tried in turn, or a callable that returns the current one.
    A stream that makes no progress for `give_up_s` raises `Unavailable`. Other calls take at most
    `timeout_s`. Use it as an asynchronous context manager, or call `close`.
    """

    def __init__(self, target: Target, *, give_up_s: float = 60.0, timeout_s: float = 30.0) -> None:
        self._connection = Connection(target)
        self._give_up_s = give_up_s
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; open streams end."""
        await self._connection.close()

    async def generate(self, prompt: str | Sequence[int], **options: Any) -> Chunk:
        """The whole answer as one chunk; `options` as for `stream`."""
        async with aclosing(self.stream(prompt, **options)) as chunks:
            return _joined([chunk async for chunk in chunks])

    async def stream(
        self,
        prompt: str | Sequence[int],
        *,
        sampling: Sampling | None = None,
        limits: Limits | None = None,
        request_id: str = "",
        model: str = "",
        deadline_s: float | None = None,
        resumable: bool = True,
        detokenize: bool = True,
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks of the answer to a text or to token ids, re-attaching when the connection is lost.

        Closing the iterator early aborts the request; a client that is cut off from a `resumable` one
        can `attach` to it. A request that is not resumable ends with its connection. The server's
        refusals with a retry time (`QueueFull`, `Unavailable`) are retried.
        """
        try:
            request = translate.request_message(
                request_id or uuid.uuid4().hex, prompt, sampling or Sampling(), limits or Limits()
            )
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"The request cannot be sent: {error}.") from error
        request.model, request.resumable, request.detokenize = model, resumable, detokenize
        if deadline_s is not None:
            request.deadline_s = deadline_s
        try:
            async with aclosing(self._resumed(request.request_id, 0, request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (GeneratorExit, asyncio.CancelledError):
            await self._abort_quietly(request.request_id)
            raise

    async def attach(self, request_id: str, resume_from: int = 0) -> AsyncGenerator[Chunk, None]:
        """The stream of a known request from output token `resume_from` on. Raises `NotFound`."""
        async with aclosing(self._resumed(request_id, resume_from, None)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def abort(self, request_id: str) -> bool:
        """End a request now; False if it had ended already. Raises `NotFound`."""
        response = await self._control("Abort", control_pb2.AbortRequest(request_id=request_id))
        return bool(response.aborted)

    async def server_info(self) -> ServerInfo:
        """What is being served right now."""
        return translate.info_value(await self._control("GetServerInfo", control_pb2.GetServerInfoRequest()))

    async def plan(self) -> control_pb2.GetPlanResponse:
        """The plan book in force: canonical JSON, SHA-256, source and version."""
        response: control_pb2.GetPlanResponse = await self._control("GetPlan", control_pb2.GetPlanRequest())
        return response

    async def reload_plan(self, source: str = "") -> str:
        """Load a plan book from a file on the server, or poll the registry; returns its SHA-256."""
        response = await self._control("ReloadPlan", control_pb2.ReloadPlanRequest(source=source))
        return str(response.sha256)

    async def drain(self, timeout_s: float | None = None) -> int:
        """Refuse new requests and wait for running ones; returns how many were left at the timeout."""
        request = control_pb2.DrainRequest(timeout_s=timeout_s)
        call_timeout_s = self._timeout_s + (timeout_s or self._give_up_s)
        return int((await self._control("Drain", request, call_timeout_s)).remaining)

    async def notify(self, instance: str, deadline_s: float, source: str = "") -> None:
        """Say that an instance will be gone in `deadline_s` seconds. Raises `NotFound`."""
        request = control_pb2.NotifyPreemptionRequest(instance=instance, deadline_s=deadline_s, source=source)
        await self._control("NotifyPreemption", request)

    async def watch_events(self, since: int = 0) -> AsyncGenerator[Event, None]:
        """Events with a sequence number above `since`, then live ones, until it is closed."""
        stub = self._connection.control(self._connection.address)
        async for message in _messages(stub.WatchEvents(control_pb2.WatchEventsRequest(since=since))):
            yield translate.event_value(message)

    async def _control(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        stub = self._connection.control(self._connection.address)
        return await _answer(getattr(stub, method)(request, timeout=timeout_s or self._timeout_s))

    async def _abort_quietly(self, request_id: str) -> None:
        try:
            stub = self._connection.control(self._connection.address)
            await stub.Abort(control_pb2.AbortRequest(request_id=request_id), timeout=1.0)
        except grpc.RpcError:
            pass  # it had ended, or the server is gone

    async def _resumed(
        self, request_id: str, position: int, request: inference_pb2.GenerateRequest | None
    ) -> AsyncGenerator[Chunk, None]:
        """The stream from `position` on, over as many connections as it takes."""
        backoff = Backoff(self._give_up_s)
        retried = (QueueFull, Unavailable, TransportError) if _is_resumable(request) else (QueueFull, Unavailable)
        while True:
            address = self._connection.address
            try:
                async for message in self._call(address, request_id, position, request):
                    chunk = translate.chunk_value(message)
                    _check_continuity(chunk, position, request_id)
                    position += len(chunk.token_ids)
                    backoff.reset()
                    yield chunk
                    if chunk.finish is not None:
                        _check_finish(chunk, position)
                        return
                raise TransportError(f"The stream of {request_id} ended after {position} tokens without a finish.")
            except retried as error:
                self._connection.failed(address)
                await backoff.wait(error)

    def _call(
        self, address: str, request_id: str, position: int, request: inference_pb2.GenerateRequest | None
    ) -> AsyncIterator[inference_pb2.GenerateStreamResponse]:
        stub = self._connection.inference(address)
        if request is None or position > 0:
            attach = inference_pb2.AttachRequest(request_id=request_id, resume_from=position)
            return _messages(stub.Attach(attach))
        timeout_s = request.deadline_s + _DEADLINE_MARGIN_S if request.HasField("deadline_s") else None
        return _messages(stub.GenerateStream(request, timeout=timeout_s))


async def _messages(call: Any) -> AsyncGenerator[Any, None]:
    try:
        async for message in call:
            yield message
    except grpc.aio.AioRpcError as error:
        raise from_call(error) from error
    except asyncio.CancelledError:
        _raise_unless_cancelled()
        raise
    finally:
        call.cancel()


async def _answer(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_call(error) from error
    except asyncio.CancelledError:
        _raise_unless_cancelled()
        raise


def _raise_unless_cancelled() -> None:
    # gRPC reports a call that the server or the channel ended as if this task had been cancelled
    task = asyncio.current_task()
    if task is not None and not task.cancelling():
        raise TransportError("The connection to the server was closed.")


def _is_resumable(request: inference_pb2.GenerateRequest | None) -> bool:
    return request is None or request.resumable


def _check_continuity(chunk: Chunk, position: int, request_id: str) -> None:
    if chunk.output_index != position:
        raise BrokenStream(f"Stream {request_id} went on at token {chunk.output_index} where {position} was due.")


def _check_finish(chunk: Chunk, position: int) -> None:
    if chunk.finish == "deadline":
        raise DeadlineExceeded(f"The deadline passed after {position} tokens; allow more time or fewer tokens.")
    if chunk.finish == "abort":
        raise Aborted(f"The request was aborted after {position} tokens.", tokens=position)


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    return Chunk(
        output_index=0,
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        text="".join(chunk.text for chunk in chunks),
        logprobs=tuple(value for chunk in chunks for value in chunk.logprobs),
        top=tuple(top for chunk in chunks for top in chunk.top),
        finish=chunks[-1].finish,
    )
