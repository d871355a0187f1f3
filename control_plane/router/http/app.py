"""HTTP: OpenAI's dialect as vLLM speaks it on the public port, and the operator's port.

    public   POST /v1/completions /v1/chat/completions /tokenize /detokenize /abort_requests /reset_prefix_cache
             GET  /v1/models /v1/models/NAME /tokenizer_info /version /load /openapi.json /health /ready /ping
    admin    GET  /admin/v1/workers /health /ready /metrics   POST /abort_requests /reset_prefix_cache

Where keys are configured, everything on the public port but what is `OPEN` needs one, before anything else is looked
at. The admin port asks for none: bind it where clients cannot reach it.

Times outside this package's HTTP modules: those of connections and headers are `server`'s; deadlines of the work
are the core's. What does not belong here: calls with bodies (`generation`, `json_calls`, `intake`).
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from control_plane.router.access.caller import Caller
from control_plane.router.access.tenants import EVERYBODY, Keys, Tenant
from control_plane.router.client_errors import as_ours
from control_plane.router.edge import Edge, RouterState
from control_plane.router.http.generation import Front, Generation
from control_plane.router.http.headers import headers_read, label_of, tenant_of
from control_plane.router.http.intake import Intake
from control_plane.router.http.json_calls import JsonCall, Refused, aborted_ids_untrusted
from control_plane.router.http.openapi import document
from control_plane.router.http.responses import (
    encode_json,
    error_body,
    error_value,
    http_status,
    json_response,
    retry_after,
    send_error,
)
from control_plane.router.metrics import RouterMetrics
from control_plane.router.text.vocabulary import ModelCard
from control_plane.router.validation.body import BodyMemory
from control_plane.router.validation.cutouts import Body
from control_plane.router.validation.validator import ValidatedRequest, Validator
from engine.base import limits
from engine.base.errors import NotFound, PermissionDenied, TriptychError

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
OPEN: Final = frozenset(("/health", "/ready", "/ping", "/version"))  # for probes, which have no key
NOT_YET: Final = ("/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/rerank", "/v1/score")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    version: str = "0"
    body_bytes_max: int = limits.BODY_BYTES_MAX
    image_body_bytes_max: int = limits.IMAGE_BODY_BYTES_MAX  # with images
    body_read_ms: int = limits.BODY_READ_MS
    bodies_held_bytes_max: int = limits.BODIES_HELD_BYTES_MAX


def public_app(
    *,
    edge: Edge,
    validator: Validator,
    state: RouterState,
    wall_s: Callable[[], float],
    keys: Keys | None = None,
    config: Config | None = None,
) -> ASGIApp:
    """Everything on the public port. Without `keys` everybody may do everything."""
    config = config or Config()
    keys = keys or Keys()
    memory = BodyMemory(config.bodies_held_bytes_max, tenants=len(keys.names))
    intake = image_intake = Intake(memory, config.body_bytes_max, config.body_read_ms)
    if validator.sees:
        image_intake = Intake(
            memory, config.image_body_bytes_max, config.body_read_ms, json_bytes_max=config.body_bytes_max
        )
    front = Front(
        edge=edge, keys=keys, intake=intake, image_intake=image_intake, clock_us=validator.clock_us, wall_s=wall_s
    )
    calls = _calls(front, validator)
    others = Guarded(
        _application(
            *(Route(path, call, methods=["POST"]) for path, call in calls.items()),
            *(Route(path, _not_yet(path), methods=["POST"]) for path in NOT_YET),
            *_facts(edge, validator, config.version, created=int(wall_s())),
            Route("/reset_prefix_cache", _reset_by_admins(edge.reset_cache), methods=["POST"]),
            *_probes(state),
        ),
        keys,
        edge.refused,
    )

    def public(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Calls go past Starlette: its eight coroutines around an answer and two around each `send` would all be
        passed through for every streamed token. What else has their paths (405) is Starlette's, like every other."""
        call = calls.get(scope["path"]) if scope["method"] == "POST" else None
        return others(scope, receive, send) if call is None else call(scope, receive, send)

    return public


def admin_app(
    *, state: RouterState, metrics: RouterMetrics, reset_cache: Callable[[], None], abort: Callable[[str], None]
) -> Starlette:
    """Everything on the operator's port."""

    async def workers(_: Request) -> Response:
        return json_response({"workers": [asdict(worker) for worker in state.workers()]})

    async def expose(request: Request) -> Response:
        text, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    async def reset_prefix_cache(_: Request) -> Response:
        reset_cache()
        return Response()

    def own_mistake(error: TriptychError, label: str) -> None:
        """An operator's, which is in nobody's statistics."""

    intake = Intake(BodyMemory(limits.BODIES_HELD_BYTES_MAX), limits.ABORT_BYTES_MAX, limits.BODY_READ_MS)
    aborts = JsonCall(Keys(), intake, _abort(lambda id, _: abort(id)), own_mistake)
    return _application(
        Route("/admin/v1/workers", workers),
        Route("/metrics", expose),
        Route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"]),
        Route("/abort_requests", aborts, methods=["POST"]),
        *_probes(state),
    )


# -- calls with bodies -------------------------------------------------------------------------------------------------
def _calls(front: Front, validator: Validator) -> dict[str, ASGIApp]:
    async def completion(body: Body, caller: Caller) -> list[ValidatedRequest]:
        return await validator.completion(body.json, caller)

    async def chat(body: Body, caller: Caller) -> list[ValidatedRequest]:
        return [await validator.chat(body, caller)]

    async def detokenize(body: Body, tenant: Tenant) -> dict[str, Any]:
        return await validator.detokenize(body.json, tenant)

    refused = front.edge.refused
    return {
        COMPLETIONS: Generation(front, front.intake, completion),
        CHAT: Generation(front, front.image_intake, chat),
        "/tokenize": JsonCall(front.keys, front.image_intake, validator.tokenize, refused),
        "/detokenize": JsonCall(front.keys, front.intake, detokenize, refused),
        "/abort_requests": JsonCall(front.keys, front.intake, _abort(front.edge.abort), refused),
    }


def _abort(abort: Callable[[str, Tenant], None]) -> Callable[[Body, Tenant], Awaitable[None]]:
    async def work(body: Body, tenant: Tenant) -> None:
        for id in aborted_ids_untrusted(body.json):
            abort(id, tenant)

    return work


# -- keys --------------------------------------------------------------------------------------------------------------
class Guarded:
    """An application that only those with a key reach, except for what is open. `scope["tenant"]` is who asks."""

    def __init__(self, app: ASGIApp, keys: Keys, refused: Refused) -> None:
        self._app = app
        self._keys = keys
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_read(scope["headers"])
        try:
            tenant = EVERYBODY if scope["path"] in OPEN else tenant_of(headers, self._keys)
        except Exception as raised:
            error, label = as_ours(raised), label_of(headers)
            self._refused(error, label)
            await send_error(send, error, label)
            return
        await self._app({**scope, "tenant": tenant}, receive, send)


def _reset_by_admins(reset_cache: Callable[[], None]) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        if not request.scope["tenant"].admin:
            raise PermissionDenied("only an administrator's key may reset the cache")
        reset_cache()
        return Response()

    return endpoint


# -- the small endpoints -----------------------------------------------------------------------------------------------
def _facts(edge: Edge, validator: Validator, version: str, created: int) -> list[Route]:
    async def load(_: Request) -> Response:
        return json_response({"server_load": edge.in_flight})

    async def tokenizer_info(_: Request) -> Response:
        return json_response(validator.tokenizer_info())

    model = model_body(edge.card, created)
    return [
        Route("/v1/models", _constant({"object": "list", "data": [model]})),
        Route("/v1/models/{name:path}", _model(model)),
        Route("/tokenizer_info", tokenizer_info),
        Route("/version", _constant({"version": version})),
        Route("/load", load),
        Route("/openapi.json", _constant(document(edge.card, version))),
    ]


def _model(body: Mapping[str, Any]) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        if request.path_params["name"] != body["id"]:
            raise NotFound("model: this model is not served here; GET /v1/models lists what is", field="model")
        return json_response(body)

    return endpoint


def model_body(card: ModelCard, created: int) -> dict[str, Any]:
    return {
        "id": card.name,
        "object": "model",
        "created": created,
        "owned_by": "triptych",
        "root": card.name,
        "parent": None,
        "max_model_len": card.max_model_len,
        "permission": [],
    }


def _probes(state: RouterState) -> list[Route]:
    async def health(_: Request) -> Response:
        return Response()  # the process answers; whether it can serve is /ready's question

    async def ready(_: Request) -> Response:
        is_ready = state.ready
        retry = {} if is_ready else {"retry-after": retry_after(limits.RETRY_AFTER_MS).decode()}
        body = {"ready": is_ready, "in_flight": state.in_flight}
        return json_response(body, 200 if is_ready else 503, retry)

    return [Route("/health", health), Route("/ready", ready), Route("/ping", health, methods=["GET", "POST"])]


def _not_yet(path: str) -> Callable[[Request], Any]:
    """What clients of OpenAI and vLLM ask for and is not there yet: a clear 400."""
    body = error_value(400, f"{path}: not served yet; POST {COMPLETIONS} and {CHAT} are")

    async def endpoint(_: Request) -> Response:
        return json_response(body, 400)

    return endpoint


def _constant(value: Any) -> Callable[[Request], Any]:
    body = encode_json(value)

    async def endpoint(_: Request) -> Response:
        return Response(body, media_type="application/json")

    return endpoint


# -- Starlette ---------------------------------------------------------------------------------------------------------
def _application(*routes: Route) -> Starlette:
    async def refuse(_: Request, raised: Exception) -> Response:
        assert isinstance(raised, HTTPException)
        return json_response(error_value(raised.status_code, raised.detail), raised.status_code, raised.headers)

    async def ours(_: Request, raised: Exception) -> Response:
        assert isinstance(raised, TriptychError)
        return json_response(error_body(raised), http_status(raised))

    async def bug(_: Request, raised: Exception) -> Response:
        return json_response(error_value(500, "internal error"), 500)

    handlers: dict[Any, Any] = {HTTPException: refuse, TriptychError: ours, Exception: bug}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirected POST loses its body in half of the clients
    return app
