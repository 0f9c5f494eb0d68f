"""One server interceptor: exceptions become status codes, unreadable messages become INVALID_ARGUMENT."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import code_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from serving.api.status import to_status
from serving.errors import InvalidInput, PerennialError, Unavailable

logger = logging.getLogger(__name__)

Behavior = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]
_INTERNAL = "The server failed unexpectedly; its log has the reason."


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of `perennial.v1`; health and reflection answer for themselves."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The handler of a call, with its exceptions mapped."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith("/perennial.v1."):
            return handler
        build = grpc.unary_stream_rpc_method_handler if handler.response_streaming else _unary
        behavior = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return build(_mapped(behavior, method), _tolerant(handler.request_deserializer), handler.response_serializer)


_unary = grpc.unary_unary_rpc_method_handler


class _Unreadable:
    """Stands for a request whose bytes are not the message that they should be."""


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    # gRPC closes a call whose request cannot be parsed as UNKNOWN, with a Python exception for a message
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Unreadable()

    return parse


def _mapped(behavior: Behavior, method: str) -> Behavior:
    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            if isinstance(request, _Unreadable):
                raise InvalidInput("The request is not a valid protobuf message; strings in it must be UTF-8.")
            return await behavior(request, context)
        except PerennialError as error:
            await context.abort_with_status(to_status(error))
        except asyncio.CancelledError:
            # without this a call whose work, not whose client, was cancelled would stay open without an answer
            if _is_cancelled():
                raise
            await context.abort_with_status(to_status(Unavailable("The call was interrupted; try again.")))
        except grpc.aio.AbortError:
            raise
        except Exception:
            logger.exception("%s failed", method)
            status = Status(code=code_pb2.INTERNAL, message=_INTERNAL)
            await context.abort_with_status(rpc_status.to_status(status))

    return call


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
