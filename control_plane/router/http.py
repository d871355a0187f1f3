"""HTTP: OpenAI's completions in vLLM's dialect on the public port, and the operator's port.

    public   POST /v1/completions   GET /v1/models /health /ready /version /metrics
    admin    GET /admin/v1/workers /health /ready /metrics

Completions are a raw ASGI application: a streamed token costs one wake-up, one JSON string and one `send`; everything
around it is built once per request. Response headers wait for the first token, so that a request which fails before it
gets its true status. A client that goes away closes its stream, which frees everything everywhere.

Times outside this module: header and idle limits are the server's (uvicorn); deadlines of the work are the core's.
What does not belong here: checking values (`validation`), request life (`edge`).
"""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from control_plane.router.edge import Delta, Edge, RequestStream, RouterState, as_ours, public_message, word
from control_plane.router.metrics import RouterMetrics
from control_plane.router.requests import Ended, RequestStats
from control_plane.router.validation import Validator
from control_plane.router.vocabulary import ModelCard
from engine.base import limits
from engine.base.errors import InvalidArgument, NotFound, Status, TriptychError
from engine.types import FinishReason

log = logging.getLogger("triptych.router")
encode_json: Final = msgspec.json.encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    version: str = "0"
    body_bytes_max: int = limits.BODY_BYTES_MAX
    body_read_ms: int = 30_000  # a body that takes longer is an attack or a dead link (reliability C9)


class BodyTooLarge(InvalidArgument):
    """Refused while reading: no more than the limit is ever held."""


class BodyTooSlow(InvalidArgument):
    """The client did not finish its body in time."""


class ClientGone(Exception):
    """The client left before its body was whole: nobody is there to answer."""


def public_app(
    *,
    edge: Edge,
    validator: Validator,
    state: RouterState,
    metrics: RouterMetrics,
    wall_s: Callable[[], float],
    config: Config | None = None,
) -> Starlette:
    """Everything on the public port."""
    config = config or Config()
    created = int(wall_s())
    completions = Completions(edge, validator, wall_s, config)
    return _application(
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", _constant(models_body(edge.card, created))),
        Route("/version", _constant({"version": config.version})),
        *_probe_routes(state, metrics),
    )


def admin_app(*, state: RouterState, metrics: RouterMetrics) -> Starlette:
    """Everything on the operator's port. Bind it where clients cannot reach it."""

    async def workers(_: Request) -> Response:
        return json_response({"workers": [asdict(worker) for worker in state.workers()]})

    return _application(Route("/admin/v1/workers", workers), *_probe_routes(state, metrics))


# -- POST /v1/completions ----------------------------------------------------------------------------------------------
class Completions:
    """One request, from its first byte to its last, streamed or not."""

    def __init__(self, edge: Edge, validator: Validator, wall_s: Callable[[], float], config: Config) -> None:
        self._edge = edge
        self._validator = validator
        self._wall_s = wall_s
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        label = request_label(scope)
        try:
            stream = await self._open(receive, label)
        except ClientGone:
            return
        except Exception as raised:
            error = as_ours(raised)
            self._edge.refused(error, label)
            await send_error(send, error, label)
            return
        with stream:
            await self._serve(stream, receive, send)

    async def _open(self, receive: Receive, label: str) -> RequestStream:
        async with asyncio.timeout(self._config.body_read_ms / 1000) as limit:
            try:
                body = await read_body(receive, self._config.body_bytes_max)
            except asyncio.CancelledError:
                if limit.expired():
                    raise BodyTooSlow(
                        f"body: must arrive within {self._config.body_read_ms} ms", field="body"
                    ) from None
                raise
        request = await self._validator.completion(body, label=label)
        return self._edge.open(request)

    async def _serve(self, stream: RequestStream, receive: Receive, send: Send) -> None:
        """Answer while watching for the client's departure. Two tasks, both gone when this returns."""
        watch = asyncio.create_task(_close_on_disconnect(receive, stream))
        answer = Answer(stream, int(self._wall_s()), self._edge.card.name)
        try:
            async with stream.patience():
                await (answer.stream(send) if stream.request.stream else answer.whole(send))
        except (TimeoutError, OSError):  # does not read, or is gone; an incomplete response makes the server hang up
            log.debug("response abandoned id=%s", stream.id)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)


class Answer:
    """The bytes of one response. What does not change between tokens is encoded once."""

    def __init__(self, stream: RequestStream, created: int, model: str) -> None:
        self._stream = stream
        self._request = stream.request
        self._head = {"id": f"cmpl-{stream.id}", "object": "text_completion", "created": created, "model": model}
        # {"id":...,"model":...,"choices":[{"index":0,"text":  "..."  ,"logprobs":null,...}],"usage":  null  }
        self._before_text = b"data: " + encode_json(self._head)[:-1] + b',"choices":[{"index":0,"text":'
        self._after_text = b',"logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":'
        self._completion_tokens = 0
        self._last_token: int | None = None

    # -- streamed ------------------------------------------------------------------------------------------------------
    async def stream(self, send: Send) -> None:
        delta = await self._next()
        if delta.ended is not None and delta.ended.error is not None and not delta.token_ids:
            await send_error(send, delta.ended.error, self._request.label or self._stream.id)
            return
        await send(_start(200, b"text/event-stream; charset=utf-8", self._headers()))
        while delta.ended is None:
            await send(_part(self.chunk(delta.text)))
            delta = await self._next()
        await send(_last(self._closing_events(delta, delta.ended)))

    def chunk(self, text: str) -> bytes:
        """One event with text. The hot path: no dict, one string encoded."""
        usage = encode_json(self._usage()) if self._request.continuous_usage else b"null"
        return b"".join((self._before_text, encode_json(text), self._after_text, usage, b"}\n\n"))

    def _closing_events(self, delta: Delta, ended: Ended) -> bytes:
        """Everything after the last ordinary chunk, in one write."""
        events = self._failure_events(delta, ended.error) if ended.error else self._finish_events(delta, ended)
        return b"".join((*events, b"data: [DONE]\n\n"))

    def _failure_events(self, delta: Delta, error: TriptychError) -> list[bytes]:
        text = [self.chunk(delta.text)] if delta.token_ids else []
        return [*text, _event(error_body(error))]

    def _finish_events(self, delta: Delta, ended: Ended) -> list[bytes]:
        """The last content chunk and, if asked for, the usage chunk. `triptych` rides on whichever is last."""
        last = {**self._head, "choices": [self._choice(delta.text, ended)], "usage": None}
        if not self._request.include_usage:
            return [_event(last | {"triptych": stats_body(ended.stats)})]
        if self._request.continuous_usage:
            last["usage"] = self._usage()
        usage = {**self._head, "choices": [], "usage": self._usage(), "triptych": stats_body(ended.stats)}
        return [_event(last), _event(usage)]

    # -- whole ---------------------------------------------------------------------------------------------------------
    async def whole(self, send: Send) -> None:
        pieces: list[str] = []
        delta = await self._next()
        while delta.ended is None:
            pieces.append(delta.text)
            delta = await self._next()
        if delta.ended.error is not None:
            await send_error(send, delta.ended.error, self._request.label or self._stream.id)
            return
        text = "".join((*pieces, delta.text))
        body = {**self._head, "choices": [self._choice(text, delta.ended)], "usage": self._usage()}
        await _send_whole(send, 200, body | {"triptych": stats_body(delta.ended.stats)}, self._headers())

    # -- both ----------------------------------------------------------------------------------------------------------
    async def _next(self) -> Delta:
        try:
            delta = await self._stream.next()
        except Exception as raised:  # detokenising: a bug fails its own request only (I11)
            failed = Ended(key=self._stream.key, error=as_ours(raised), stats=RequestStats())
            return Delta("", (), failed)
        if delta.token_ids:
            self._completion_tokens += len(delta.token_ids)
            self._last_token = delta.token_ids[-1]
        return delta

    def _choice(self, text: str, ended: Ended) -> dict[str, Any]:
        return {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": ended.finish.value if ended.finish else None,
            "stop_reason": self._stop_reason(ended),
        }

    def _stop_reason(self, ended: Ended) -> int | None:
        """vLLM's extra: which of the client's own stop tokens ended it; null for the model's end of sequence."""
        its_own = self._last_token in self._request.sampling.stop_token_ids
        return self._last_token if ended.finish is FinishReason.STOP and its_own else None

    def _usage(self) -> dict[str, int]:
        prompt_tokens, completion_tokens = len(self._request.token_ids), self._completion_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", (self._request.label or self._stream.id).encode()), (b"cache-control", b"no-cache")]


def stats_body(stats: RequestStats) -> dict[str, Any]:
    """The `triptych` object of a response: what this request's disaggregation did and cost."""
    return asdict(stats)


async def _close_on_disconnect(receive: Receive, stream: RequestStream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.close("client disconnected")


async def read_body(receive: Receive, bytes_max: int) -> bytes:
    """The whole body, counted as it arrives: a length header is a claim, and chunked bodies have none."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > bytes_max:
            raise BodyTooLarge(f"body: at most {bytes_max} bytes", field="body")
        if not message.get("more_body", False):
            return b"".join(parts)


def request_label(scope: Scope) -> str:
    """The client's `x-request-id`, fit for a header and a log line."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return word(value.decode("latin-1"))
    return ""


# -- errors ------------------------------------------------------------------------------------------------------------
HTTP_STATUS: Final[Mapping[Status, int]] = {
    Status.INVALID_ARGUMENT: 400,
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
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
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
    return _error(http_status(error), public_message(error), field)


async def send_error(send: Send, error: TriptychError, label: str) -> None:
    status = http_status(error)
    headers = [(b"x-request-id", label.encode())] if label else []
    if status in RETRYABLE:
        retry_after_s = math.ceil((error.retry_after_ms or limits.RETRY_AFTER_MS) / 1000)
        headers.append((b"retry-after", str(retry_after_s).encode()))
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await _send_whole(send, status, error_body(error), headers)


def _error(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = ERROR_TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


# -- the small endpoints -----------------------------------------------------------------------------------------------
def models_body(card: ModelCard, created: int) -> dict[str, Any]:
    model = {
        "id": card.name,
        "object": "model",
        "created": created,
        "owned_by": "triptych",
        "root": card.name,
        "parent": None,
        "max_model_len": card.max_model_len,
        "permission": [],
    }
    return {"object": "list", "data": [model]}


def _probe_routes(state: RouterState, metrics: RouterMetrics) -> list[Route]:
    async def health(_: Request) -> Response:
        return Response()  # the process answers; whether it can serve is /ready's question

    async def ready(_: Request) -> Response:
        is_ready = state.ready
        retry = {} if is_ready else {"retry-after": str(math.ceil(limits.RETRY_AFTER_MS / 1000))}
        body = {"ready": is_ready, "in_flight": state.in_flight}
        return json_response(body, 200 if is_ready else 503, retry)

    async def expose(request: Request) -> Response:
        text, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    return [Route("/health", health), Route("/ready", ready), Route("/metrics", expose)]


def _application(*routes: Route) -> Starlette:
    async def refuse(_: Request, raised: Exception) -> Response:
        assert isinstance(raised, HTTPException)
        return json_response(_error(raised.status_code, raised.detail), raised.status_code, raised.headers)

    async def bug(_: Request, raised: Exception) -> Response:
        return json_response(_error(500, "internal error"), 500)

    app = Starlette(routes=routes, exception_handlers={HTTPException: refuse, Exception: bug})
    app.router.redirect_slashes = False  # a redirected POST loses its body in half of the clients
    return app


def _constant(value: Any) -> Callable[[Request], Any]:
    body = encode_json(value)

    async def endpoint(_: Request) -> Response:
        return Response(body, media_type="application/json")

    return endpoint


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encode_json(value), status, headers=headers, media_type="application/json")


# -- ASGI messages -----------------------------------------------------------------------------------------------------
def _start(status: int, content_type: bytes, headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type), *headers]}


def _part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


def _last(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": False}


def _event(value: Any) -> bytes:
    return b"data: " + encode_json(value) + b"\n\n"


async def _send_whole(send: Send, status: int, value: Any, headers: list[tuple[bytes, bytes]]) -> None:
    body = encode_json(value)
    await send(_start(status, b"application/json", [*headers, (b"content-length", str(len(body)).encode())]))
    await send(_last(body))


__all__ = ["Answer", "Completions", "Config", "admin_app", "public_app"]
