"""HTTP: OpenAI's completions in vLLM's dialect on the public port, and the operator's port.

    public   POST /v1/completions   GET /v1/models /health /ready /version /metrics
    admin    GET /admin/v1/workers /health /ready /metrics

Completions are a raw ASGI application: a streamed token costs one wake-up, one JSON string and one `send`; everything
around it is built once per request. Response headers wait for the first token, so that a request which fails before it
gets its true status. A client that goes away closes its stream, which frees everything everywhere. A router that is
full says so before it reads a body.

Times outside this module: those of connections and headers are `http_server`'s; deadlines of the work are the core's.
What does not belong here: decoding (`body`), checking values (`validation`), request life (`edge`).
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Final, Self

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from control_plane.router.body import BodyMemory, BodyTooLarge, HeldBody
from control_plane.router.edge import Delta, Edge, RequestStream, RouterState, as_ours, public_message, word
from control_plane.router.metrics import RouterMetrics
from control_plane.router.requests import Ended, RequestStats
from control_plane.router.validation import ValidatedRequest, Validator
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
    body_read_ms: int = limits.BODY_READ_MS
    bodies_held_bytes_max: int = limits.BODIES_HELD_BYTES_MAX


class BodyTooSlow(InvalidArgument):
    """The client did not finish its body in time."""


class ClientGone(Exception):
    """The client left before its request was one: nobody is there to answer."""


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
        *(Route(path, _not_yet(path), methods=["POST"]) for path in NOT_YET),
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
        self._bodies = BodyMemory(config.bodies_held_bytes_max)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        label = request_label(scope)
        async with Departure(receive) as departure:
            try:
                stream = self._edge.open(await self._request(receive, departure, label))
            except ClientGone:
                return
            except Exception as raised:
                error = as_ours(raised)
                self._edge.refused(error, label)
                await send_error(send, error, label)
                return
            with stream:
                departure.then(lambda: stream.close("client disconnected"))
                await self._serve(stream, send)

    async def _request(self, receive: Receive, departure: "Departure", label: str) -> ValidatedRequest:
        arrived_us = self._validator.clock_us()
        self._edge.check_room()
        with self._bodies.hold(self._config.body_bytes_max) as body:
            await self._read(receive, body)
            departure.watch()
            async with departure.interrupts():
                return await self._validator.completion(body.whole(), label=label, arrived_us=arrived_us)

    async def _read(self, receive: Receive, body: HeldBody) -> None:
        try:
            async with asyncio.timeout(self._config.body_read_ms / 1000):
                await read_body(receive, body)
        except TimeoutError:
            raise BodyTooSlow(f"body: must arrive within {self._config.body_read_ms} ms", field="body") from None

    async def _serve(self, stream: RequestStream, send: Send) -> None:
        answer = Answer(stream, int(self._wall_s()), self._edge.card.name)
        try:
            async with stream.patience():
                await (answer.stream(send) if stream.request.stream else answer.whole(send))
        except (TimeoutError, OSError):  # does not read, or is gone; an incomplete response makes the server hang up
            log.debug("response abandoned id=%s", stream.id)


class Departure:
    """Watches, once the body is whole, for the client to leave, and then does the one thing that stops its work.

    The task that watches is gone when the `async with` block is left.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False
        self._stop: Callable[[], None] = _nothing
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def watch(self) -> None:
        self._task = asyncio.create_task(self._until_disconnect())

    def then(self, stop: Callable[[], None]) -> None:
        """From now on `stop` is what ends the work; called at once if the client has left already."""
        self._stop = stop
        if self._gone:
            stop()

    @asynccontextmanager
    async def interrupts(self) -> AsyncIterator[None]:
        """`ClientGone` inside the block, at whatever it waits for."""
        try:
            async with asyncio.timeout(None) as limit:
                self.then(lambda: None if limit.expired() else limit.reschedule(0.0))
                try:
                    yield
                finally:
                    self._stop = _nothing
        except TimeoutError:
            raise ClientGone from None

    async def _until_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._stop()


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


def _nothing() -> None:
    pass


async def read_body(receive: Receive, body: HeldBody) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body.append(message.get("body", b""))
        if not message.get("more_body", False):
            return


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


async def send_error(send: Send, error: TriptychError, label: str) -> None:
    status = http_status(error)
    headers = [(b"x-request-id", label.encode())] if label else []
    if status in RETRYABLE:
        headers.append((b"retry-after", retry_after(error.retry_after_ms or limits.RETRY_AFTER_MS)))
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        headers.append((b"connection", b"close"))  # the rest of the body is not waited for
    await _send_whole(send, status, error_body(error), headers)


def retry_after(delay_ms: int) -> bytes:
    """The header's value, in whole seconds."""
    return b"%d" % math.ceil(delay_ms / 1000)


def error_value(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = ERROR_TYPES.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


# -- what clients of OpenAI and vLLM ask for and is not there yet: a clear 400 -----------------------------------------
NOT_YET: Final = (
    *("/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"),
    *("/v1/rerank", "/v1/score", "/tokenize", "/detokenize"),
)


def _not_yet(path: str) -> Callable[[Request], Any]:
    body = error_value(400, f"{path}: not served yet; POST /v1/completions is")

    async def endpoint(_: Request) -> Response:
        return json_response(body, 400)

    return endpoint


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
        retry = {} if is_ready else {"retry-after": retry_after(limits.RETRY_AFTER_MS).decode()}
        body = {"ready": is_ready, "in_flight": state.in_flight}
        return json_response(body, 200 if is_ready else 503, retry)

    async def expose(request: Request) -> Response:
        text, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    return [Route("/health", health), Route("/ready", ready), Route("/metrics", expose)]


def _application(*routes: Route) -> Starlette:
    async def refuse(_: Request, raised: Exception) -> Response:
        assert isinstance(raised, HTTPException)
        return json_response(error_value(raised.status_code, raised.detail), raised.status_code, raised.headers)

    async def bug(_: Request, raised: Exception) -> Response:
        return json_response(error_value(500, "internal error"), 500)

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
