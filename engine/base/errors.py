"""The error tree. One class per wire status; nothing anywhere matches on message text.

    TriptychError
    +-- InvalidArgument      400  the request can never succeed; names the field and the limit
    +-- Unauthenticated      401  no key, or none of ours
    +-- PermissionDenied     403  a key of ours that does not open this
    +-- ResourceExhausted    429  admission said no; retry after `retry_after_ms`
    +-- Unavailable          503  no worker of a needed role; retry after `retry_after_ms`
    +-- DeadlineExceeded     504  the request's own time ran out
    +-- Cancelled            499  the client went away or asked us to stop
    +-- FailedPrecondition   409  wrong epoch, role or wire version
    +-- DataLoss             502  integrity failed after every retry
    +-- Internal             500  our bug
    FrameError                    received bytes are not a frame (never reaches a client)

What does not belong here: HTTP bodies and gRPC status objects; the router's edge maps classes to those.
"""

from enum import StrEnum


class Status(StrEnum):
    """How a request ended, in the words every wire uses. Stable: part of the wire."""

    INVALID_ARGUMENT = "invalid_argument"
    UNAUTHENTICATED = "unauthenticated"
    PERMISSION_DENIED = "permission_denied"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    FAILED_PRECONDITION = "failed_precondition"
    DATA_LOSS = "data_loss"
    INTERNAL = "internal"


class TriptychError(Exception):
    """Base of every error that can end a request. `status` is what the client's code may branch on."""

    status: Status = Status.INTERNAL
    retry_after_ms: int | None = None

    def __init__(self, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms


class InvalidArgument(TriptychError):
    """The request is wrong and will stay wrong. `field` is the dotted name the client used."""

    status = Status.INVALID_ARGUMENT

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFound(InvalidArgument):
    """A name in the request (a model, a request id) is not one of ours."""


class Unauthenticated(TriptychError):
    """Nobody knows who asks."""

    status = Status.UNAUTHENTICATED


class PermissionDenied(TriptychError):
    """It is known who asks, and they may not."""

    status = Status.PERMISSION_DENIED


class ResourceExhausted(TriptychError):
    """Admission refused; the request was not started."""

    status = Status.RESOURCE_EXHAUSTED


class Unavailable(TriptychError):
    """No worker of a needed role can take the request now."""

    status = Status.UNAVAILABLE


class DeadlineExceeded(TriptychError):
    """The request's time budget ran out in some stage."""

    status = Status.DEADLINE_EXCEEDED


class Cancelled(TriptychError):
    """The client disconnected or aborted."""

    status = Status.CANCELLED


class FailedPrecondition(TriptychError):
    """A command named another epoch, role or wire version than the receiver's."""

    status = Status.FAILED_PRECONDITION


class DataLoss(TriptychError):
    """KV failed its integrity checks after every retry."""

    status = Status.DATA_LOSS


class Internal(TriptychError):
    """A bug of ours. Tests treat one of these as a failure."""


class FrameError(Exception):
    """Received bytes are not what they claim to be. The only error an `_untrusted` parser raises.

    `reason` is from a fixed set (it becomes a metric label), never text from the peer.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
