"""HTTP: OpenAI's completions in vLLM's dialect on the public port, and the operator's port.

    public   POST /v1/completions   GET /v1/models /health /ready /version /metrics
    admin    GET /admin/v1/workers /health /ready /metrics   POST /reset_prefix_cache

Completions are a raw ASGI application: a streamed token costs one wake-up, one JSON string and one `send`; everything
around it is built once per request. A client that goes away closes its stream, which frees everything everywhere. A
router that is full says so before it reads a body.

Times outside this module: those of connections and headers are `http_server`'s; deadlines of the work are the core's.
What does not belong here: decoding (`body`), checking values (`validation`), request life (`edge`), and what an answer
looks like (`answer`, `responses`).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Final, Self

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from control_plane.router.answer import Answer
from control_plane.router.body import BodyMemory, HeldBody
from control_plane.router.client_errors import as_ours
from control_plane.router.edge import Edge, RouterState, word
from control_plane.router.metrics import RouterMetrics
from control_plane.router.request_stream import RequestStream
from control_plane.router.responses import (
    BodyTooSlow,
    encode_json,
    error_value,
    json_response,
    retry_after,
    send_error,
)
from control_plane.router.validation import ValidatedRequest, Validator
from control_plane.router.vocabulary import ModelCard
from engine.base import limits

log = logging.getLogger("triptych.router")

COMPLETIONS: Final = "/v1/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    version: str = "0"
    body_bytes_max: int = limits.BODY_BYTES_MAX
    body_read_ms: int = limits.BODY_READ_MS
    bodies_held_bytes_max: int = limits.BODIES_HELD_BYTES_MAX


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
) -> ASGIApp:
    """Everything on the public port."""
    config = config or Config()
    created = int(wall_s())
    completions = Completions(edge, validator, wall_s, config)
    others = _application(
        Route(COMPLETIONS, completions, methods=["POST"]),
        Route("/v1/models", _constant(models_body(edge.card, created))),
        Route("/version", _constant({"version": config.version})),
        *(Route(path, _not_yet(path), methods=["POST"]) for path in NOT_YET),
        *_probe_routes(state, metrics),
    )

    def public(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Completions go past Starlette: its eight coroutines around an answer and two around each `send` would all be
        passed through for every streamed token. What else has that path (405) is Starlette's, like every other."""
        if scope["path"] == COMPLETIONS and scope["method"] == "POST":
            return completions(scope, receive, send)
        return others(scope, receive, send)

    return public


def admin_app(*, state: RouterState, metrics: RouterMetrics, reset_cache: Callable[[], None]) -> Starlette:
    """Everything on the operator's port. Bind it where clients cannot reach it."""

    async def workers(_: Request) -> Response:
        return json_response({"workers": [asdict(worker) for worker in state.workers()]})

    async def reset_prefix_cache(_: Request) -> Response:
        reset_cache()
        return Response()

    return _application(
        Route("/admin/v1/workers", workers),
        Route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"]),
        *_probe_routes(state, metrics),
    )


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
        answer: Answer | None = None
        try:
            answer = Answer(stream, int(self._wall_s()), self._edge.card.name, self._edge.vocabulary)
            async with stream.patience():
                await (answer.stream(send) if stream.request.stream else answer.whole(send))
        except (TimeoutError, OSError):  # does not read, or is gone; an incomplete response makes the server hang up
            log.debug("response abandoned id=%s", stream.id)
        except Exception as raised:
            if answer is not None and answer.started:
                raise  # the server logs it, and hangs up
            await send_error(send, as_ours(raised), stream.request.label)


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
