"""Errors ↔ gRPC statuses, in both directions, with `google.rpc` details."""

from __future__ import annotations

from typing import Protocol

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from data.errors import CorruptData, Infeasible
from serving.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    PerennialError,
    PlanMismatch,
    QueueFull,
    Retryable,
    TransportError,
    Unauthenticated,
    Unavailable,
)

ERROR_DOMAIN = "perennial.v1"
_CODES: dict[type[BaseException], grpc.StatusCode] = {
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Retryable: grpc.StatusCode.UNAVAILABLE,
    TransportError: grpc.StatusCode.UNAVAILABLE,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Aborted: grpc.StatusCode.ABORTED,
    PlanMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    Infeasible: grpc.StatusCode.FAILED_PRECONDITION,
    CorruptData: grpc.StatusCode.FAILED_PRECONDITION,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
}
_ERRORS: dict[grpc.StatusCode, type[PerennialError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.FAILED_PRECONDITION: PlanMismatch,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
}


class FailedCall(Protocol):
    """The part of `grpc.aio.AioRpcError` that says what went wrong."""

    def code(self) -> grpc.StatusCode:
        """The status code."""
        ...

    def details(self) -> str | None:
        """The status message."""
        ...


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status code of an error; INTERNAL for one that was not raised on purpose."""
    known = (_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)
    return next(known, grpc.StatusCode.INTERNAL)


def to_status(error: PerennialError) -> grpc.Status:
    """A status with RetryInfo for what may be retried and the partial count of what was aborted."""
    status = Status(code=code_of(error).value[0], message=str(error))
    if isinstance(error, Retryable | TransportError):
        wait_s = error.retry_after_s if isinstance(error, Retryable) else 1.0
        delay = Duration(seconds=int(wait_s), nanos=round(wait_s % 1 * 1e9))
        status.details.append(_packed(RetryInfo(retry_delay=delay)))
    if isinstance(error, Aborted):
        metadata = {"delivered_tokens": str(error.tokens)}
        status.details.append(_packed(ErrorInfo(reason="ABORTED", domain=ERROR_DOMAIN, metadata=metadata)))
    return rpc_status.to_status(status)


def from_call(call: FailedCall) -> PerennialError:
    """The error that a failed call stands for: what the server raised, as far as a status can tell."""
    code, message = call.code(), call.details() or call.code().name
    status = rpc_status.from_call(call)
    if code is grpc.StatusCode.ABORTED:
        return Aborted(message, tokens=_delivered_tokens(status))
    retry_after_s = _retry_after_s(status)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # gRPC itself answers so to a message over its limit, and then no retry helps
        return InvalidInput(message) if retry_after_s is None else QueueFull(message, retry_after_s=retry_after_s)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):  # the latter: a server that shuts down
        return TransportError(message) if retry_after_s is None else Unavailable(message, retry_after_s=retry_after_s)
    return _ERRORS.get(code, PerennialError)(message)


def _packed(detail: RetryInfo | ErrorInfo) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)
    return packed


def _retry_after_s(status: Status | None) -> float | None:
    for detail in status.details if status else ():
        if detail.Is(RetryInfo.DESCRIPTOR):
            info = RetryInfo.FromString(detail.value)
            return info.retry_delay.seconds + info.retry_delay.nanos / 1e9
    return None


def _delivered_tokens(status: Status | None) -> int:
    for detail in status.details if status else ():
        if detail.Is(ErrorInfo.DESCRIPTOR):
            return int(ErrorInfo.FromString(detail.value).metadata.get("delivered_tokens", "0"))
    return 0
