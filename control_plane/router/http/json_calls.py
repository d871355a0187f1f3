"""Calls that generate nothing, over HTTP: a body in, one JSON value or nothing out.

    POST /tokenize   /detokenize   /abort_requests

What does not belong here: how text becomes tokens (`validation`), and calls for text (`generation`).
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from control_plane.router.access.tenants import Keys, Tenant
from control_plane.router.client_errors import as_ours
from control_plane.router.http.headers import headers_read, label_of, tenant_of
from control_plane.router.http.intake import ClientGone, Departure, Intake
from control_plane.router.http.responses import json_response, send_error
from control_plane.router.validation.cutouts import Body
from engine.base import limits
from engine.base.errors import InvalidArgument, TriptychError

Work = Callable[[Body, Tenant], Awaitable[Any]]
"""From a body to a value for JSON, or to None: then the answer has no body, as vLLM's have where nothing is asked."""


Refused = Callable[[TriptychError, str], None]
"""Told the error and the client's own id of the request."""


class JsonCall:
    """One such call, from its first byte to its last."""

    def __init__(self, keys: Keys, intake: Intake, work: Work, refused: Refused) -> None:
        """`refused` accounts for those that get no answer but an error."""
        self._keys = keys
        self._refused = refused
        self._intake = intake
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_read(scope["headers"])
        label = label_of(headers)
        async with Departure(receive) as departure:
            try:
                tenant = tenant_of(headers, self._keys)
                value = await self._intake.take(receive, departure, tenant, lambda body: self._work(body, tenant))
            except ClientGone:
                return
            except Exception as raised:
                error = as_ours(raised)
                self._refused(error, label)
                await send_error(send, error, label)
                return
            answer = Response() if value is None else json_response(value)
            if label:
                answer.headers["x-request-id"] = label
            await answer(scope, receive, send)


# -- POST /abort_requests ----------------------------------------------------------------------------------------------
class _Abort(msgspec.Struct):
    request_ids: list[str]


FIELD: Final = "request_ids"


def aborted_ids_untrusted(body: bytes) -> list[str]:
    """vLLM's body: {"request_ids": [...]}. Raises `InvalidArgument`."""
    if len(body) > limits.ABORT_BYTES_MAX:
        raise InvalidArgument(f"{FIELD}: at most {limits.ABORT_BYTES_MAX} bytes", field=FIELD)
    try:
        return msgspec.json.decode(body, type=_Abort).request_ids
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidArgument(f"{FIELD}: must be a list of strings", field=FIELD) from None
