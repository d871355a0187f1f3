"""How a client reaches its server, and what the server's errors are to it; for both clients alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from engine.base.errors import (
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    TriptychError,
    Unauthenticated,
    Unavailable,
)
from engine.base.keys import is_key

TIMEOUT_S: Final = 120.0  # of a call that names none: the server's own default for a request


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """Files in PEM. `ca_file`: who signed the server's certificate; None: one of the system's authorities.

    `cert_file` and `key_file` are the client's own, for a server that asks for them; without `key_file` the key is in
    the same file.
    """

    ca_file: Path | str | None = None
    cert_file: Path | str | None = None
    key_file: Path | str | None = None

    def __post_init__(self) -> None:
        if self.key_file is not None and self.cert_file is None:
            raise InvalidArgument("key_file: needs a cert_file", field="key_file")

    def credentials(self) -> grpc.ChannelCredentials:
        """gRPC ends the whole process (abort) where it is given only one of certificate and key."""
        key = _read(self.key_file or self.cert_file)
        return grpc.ssl_channel_credentials(_read(self.ca_file), key, _read(self.cert_file))


def _read(path: Path | str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What goes with every call of one client."""

    api_key: str | None
    timeout_s: float

    def __post_init__(self) -> None:
        if self.api_key is not None and not is_key(self.api_key):
            raise InvalidArgument("api_key: is made of printable ASCII without spaces", field="api_key")

    def __repr__(self) -> str:
        return f"Terms(timeout_s={self.timeout_s})"  # without the key

    def of(self, timeout_s: float | None) -> dict[str, Any]:
        """Keyword arguments of a call; None: the client's own time."""
        metadata = (("authorization", f"Bearer {self.api_key}"),) if self.api_key is not None else ()
        return {"timeout": self.timeout_s if timeout_s is None else timeout_s, "metadata": metadata}


# -- errors ------------------------------------------------------------------------------------------------------------
CLIENT_CLOSED: Final = "the client is closed"

ERRORS: Final[Mapping[grpc.StatusCode, type[TriptychError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.UNIMPLEMENTED: FailedPrecondition,  # the server is another one, or an older one
    grpc.StatusCode.DATA_LOSS: DataLoss,
}


def error_of(failed: Any) -> TriptychError:
    """What a failed call (gRPC's `RpcError`, which has the methods of a call) is in our words."""
    kind = ERRORS.get(failed.code(), Internal)
    message = failed.details() or "the call failed"
    trailers = dict(failed.trailing_metadata() or ())
    if issubclass(kind, InvalidArgument):
        return kind(message, field=trailers.get("field"))
    retry_after_ms = str(trailers.get("retry-after-ms", ""))
    return kind(message, retry_after_ms=int(retry_after_ms) if retry_after_ms.isdecimal() else None)
