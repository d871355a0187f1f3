"""What every HTTP answer is made of: JSON, ASGI messages, and the one shape of an error.

What does not belong here: which answer a request gets (`app`), and what a completion looks like (`answers`).
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from starlette.responses import Response
from starlette.types import Message, Send

from control_plane.router.client_errors import public_message
from control_plane.router.validation.body import BodyTooLarge
from engine.base import limits
from engine.base.errors import InvalidArgument, NotFound, Status, TriptychError

encode_json: Final = msgspec.json.encode


class BodyTooSlow(InvalidArgument):
    """The client did not finish its body in time."""


# -- errors ------------------------------------------------------------------------------------------------------------
HTTP_STATUS: Final[Mapping[Status, int]] = {
    Status.INVALID_ARGUMENT: 400,
    Status.UNAUTHENTICATED: 401,
    Status.PERMISSION_DENIED: 403,
    Status.RESOURCE_EXHAUSTED: 429,
    Status.UNAVAILABLE: 503,
    Status.DEADLINE_EXCEEDED: 504,
    Status.CANCELLED: 499,
    Status.FAILED_PRECONDITION: 409,
    Status.DATA_LOSS: 502,
    Status.INTERNAL: 500,
}
HTTP_STATUS_OF: Final[Mapping[type[InvalidArgument], int]] = {NotFound: 404, BodyTooLarge: 413, BodyTooSlow: 408}
ERROR_TYPES: Final[Mapping[int, str]] = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    499: "ClientClosedRequestError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}
RETRYABLE: Final = (429, 503)


def http_status(error: TriptychError) -> int:
    if isinstance(error, InvalidArgument):
        return HTTP_STATUS_OF.get(type(error), 400)
    return HTTP_STATUS[error.status]


def error_body(error: TriptychError) -> dict[str, Any]:
    """Nested, as OpenAI and vLLM have it."""
    field = error.field if isinstance(error, InvalidArgument) else None
    return error_value(http_status(error), public_message(error), field)


def error_value(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = ERROR_TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


async def send_error(send: Send, error: TriptychError, label: str) -> None:
    status = http_status(error)
    headers = [(b"x-request-id", label.encode())] if label else []
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in RETRYABLE:
        headers.append((b"retry-after", retry_after(error.retry_after_ms or limits.RETRY_AFTER_MS)))
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        headers.append((b"connection", b"close"))  # the rest of the body is not waited for
    await send_whole(send, status, encode_json(error_body(error)), headers)


def retry_after(delay_ms: int) -> bytes:
    """The header's value, in whole seconds."""
    return b"%d" % math.ceil(delay_ms / 1000)


# -- JSON and ASGI messages --------------------------------------------------------------------------------------------
def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode_json(value), status, headers=headers, media_type="application/json")


def start(status: int, content_type: bytes, headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type), *headers]}


def part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


def last(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": False}


def event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(value) + b"\n\n"


async def send_whole(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    await send(start(status, b"application/json", [*headers, (b"content-length", str(len(body)).encode())]))
    await send(last(body))
