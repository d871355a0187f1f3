"""What every gRPC service of the router does with a call: whose it is, how it becomes a request, how it ends.

    metadata      read as HTTP's headers are (`headers`)
    deadline      the call's own, for a request that names none
    an error      its status code; the field or the time to come back in trailing metadata

What does not belong here: messages (`inference_service`, `vllm_service`), health (`health`), and what a client may
ask for (`validation`).
"""

import functools
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final, NoReturn, Protocol, TypeVar

import grpc

from control_plane.router.access.caller import Caller
from control_plane.router.access.tenants import Keys, Tenant
from control_plane.router.answers.request_stream import News, RequestStream
from control_plane.router.client_errors import as_ours, public_message
from control_plane.router.edge import Edge
from control_plane.router.http.headers import Headers, caller_untrusted, headers_read, tenant_of
from control_plane.router.validation.fields import word
from control_plane.router.validation.validator import Validator
from engine.base import limits
from engine.base.errors import Cancelled, InvalidArgument, NotFound, Status, TriptychError

log = logging.getLogger("triptych.router")

Context = grpc.aio.ServicerContext[Any, Any]
Value = TypeVar("Value")

GRPC_CODE: Final[Mapping[Status, grpc.StatusCode]] = {
    Status.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Status.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Status.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Status.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Status.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Status.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Status.CANCELLED: grpc.StatusCode.CANCELLED,
    Status.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Status.DATA_LOSS: grpc.StatusCode.DATA_LOSS,
    Status.INTERNAL: grpc.StatusCode.INTERNAL,
}
RETRYABLE: Final = (Status.RESOURCE_EXHAUSTED, Status.UNAVAILABLE)


# -- calls that become requests ----------------------------------------------------------------------------------------
class Reception:
    """Who calls, and what their call asks for."""

    def __init__(self, edge: Edge, validator: Validator, keys: Keys) -> None:
        self._edge = edge
        self._validator = validator
        self._keys = keys
        self._opened_us = validator.clock_us()

    @property
    def uptime_s(self) -> float:
        return (self._validator.clock_us() - self._opened_us) / 1_000_000

    def tenant(self, context: Context) -> Tenant:
        """Raises `Unauthenticated`."""
        return tenant_of(_headers(context), self._keys)

    async def open(self, context: Context, request_id: str, read: Callable[[], dict[str, Any]]) -> RequestStream:
        """`read` gives the fields under the names that HTTP has for them, so that both share checks and error texts."""
        label, tenant = word(request_id), ""
        try:
            caller = self._caller(context, label)
            label, tenant = caller.label, caller.tenant.name
            self._edge.check_room()
            return self._edge.open(await self._validator.validate(_with_deadline(read(), context), caller))
        except Exception as raised:
            error = as_ours(raised)
            self._edge.refused(error, label, tenant)
            raise error from None

    def _caller(self, context: Context, label: str) -> Caller:
        headers = _headers(context)
        caller = caller_untrusted(headers, tenant_of(headers, self._keys), self._validator.clock_us())
        return replace(caller, label=label or caller.label)


def _headers(context: Context) -> Headers:
    """Metadata is the headers of a call: read by the same code. What is no text is none of those."""
    metadata = context.invocation_metadata() or ()
    return headers_read(
        (key.encode("latin-1", "replace"), value.encode("latin-1", "replace"))
        for key, value in metadata
        if isinstance(value, str)
    )


def _with_deadline(fields: dict[str, Any], context: Context) -> dict[str, Any]:
    """Who set a deadline for the call and none for the request wants the answer by then, or not at all."""
    knobs = fields.get("triptych", {})
    left_s = context.time_remaining()
    if left_s is None or knobs.get("deadline_ms") is not None:
        return fields
    left_ms = min(max(1, int(left_s * 1_000)), limits.REQUEST_DEADLINE_MS_MAX)
    return fields | {"triptych": knobs | {"deadline_ms": left_ms}}


def at_most(values: Iterable[Value], count_max: int) -> list[Value]:
    """One more than is allowed is enough for whoever counts: a message of 4 MiB may hold millions of empty strings."""
    return list(islice(values, count_max + 1))


# -- answers -----------------------------------------------------------------------------------------------------------
class Answer(Protocol):
    """The messages of one request's answer."""

    def responses(self, news: News) -> Iterator[Any]: ...


async def respond(context: Context, stream: RequestStream, answer: Answer) -> None:
    """Write the answer as it comes. Raises the error that ended the request."""
    try:
        async with stream.patience():
            error = await _write(context, stream, answer)
    except TimeoutError:
        log.debug("response abandoned id=%s", stream.id)
        raise Cancelled("the client does not read") from None
    if error is not None:
        raise error


async def _write(context: Context, stream: RequestStream, answer: Answer) -> TriptychError | None:
    while True:
        news = await stream.next()
        for response in answer.responses(news):
            await context.write(response)
        if news.ended is not None:
            return news.ended.error


Handler = Callable[[Any, Any, Context], Awaitable[Value]]


def answered(handler: Handler[Value]) -> Handler[Value]:
    """Every error that leaves `handler` ends its call with the error's code. A request of None was no message."""

    @functools.wraps(handler)
    async def answer(service: Any, request: Any, context: Context) -> Value:
        try:
            if request is None:
                raise InvalidArgument("message: must be the protobuf message that this method takes", field="message")
            return await handler(service, request, context)
        except Exception as raised:
            await abort(context, as_ours(raised))

    return answer


async def abort(context: Context, error: TriptychError) -> NoReturn:
    """End the call with the error's code; what a program may want to know of it travels as trailing metadata."""
    code = grpc.StatusCode.NOT_FOUND if isinstance(error, NotFound) else GRPC_CODE[error.status]
    await context.abort(code, public_message(error), _trailers(error))


def _trailers(error: TriptychError) -> Sequence[tuple[str, str]]:
    if error.status in RETRYABLE:
        return (("retry-after-ms", str(error.retry_after_ms or limits.RETRY_AFTER_MS)),)
    if isinstance(error, InvalidArgument) and error.field:
        return (("field", _metadata_value(error.field)),)
    return ()


_NOT_VISIBLE: Final = re.compile(r"[^!-~]")


def _metadata_value(text: str) -> str:
    """Visible ASCII, as gRPC wants it, `messages[1].role` as it is; and not long."""
    return _NOT_VISIBLE.sub("_", text[: limits.REQUEST_ID_CHARACTERS_MAX])
