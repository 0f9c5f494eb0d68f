"""What can go wrong for a caller of the service. One interceptor maps these to status codes."""

from data.errors import InvalidInput, PerennialError


class NotFound(PerennialError):
    """No such request, instance or plan."""


class AlreadyExists(PerennialError):
    """The request id is in use by another request."""


class Retryable(PerennialError):
    """Try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Retryable):
    """Admission queue or KV space is exhausted."""


class Unavailable(Retryable):
    """Draining, or no plan fits the surviving devices."""


class DeadlineExceeded(PerennialError):
    """The request's deadline passed before it finished."""


class Aborted(PerennialError):
    """The request was aborted; `tokens` of it had been delivered."""

    def __init__(self, message: str, *, tokens: int = 0) -> None:
        super().__init__(message)
        self.tokens = tokens


class PlanMismatch(PerennialError):
    """The plan book is for another model or fleet, or is damaged."""


class Unauthenticated(PerennialError):
    """The join token is missing or wrong."""


class TransportError(PerennialError):
    """A connection of the control plane broke or carried something that is not a message."""


class BrokenStream(PerennialError):
    """A stream's tokens came with a gap or a repeat; this is a bug of the server."""


__all__ = [
    "Aborted",
    "AlreadyExists",
    "BrokenStream",
    "DeadlineExceeded",
    "InvalidInput",
    "NotFound",
    "PerennialError",
    "PlanMismatch",
    "QueueFull",
    "Retryable",
    "TransportError",
    "Unauthenticated",
    "Unavailable",
]
