"""gRPC `triptych.v1.Inference`: translates messages to the edge's values and back, and statuses to gRPC codes.

No decision, no timer, no retry. Limits and texts are `validation`'s, a request's life is `edge`'s: a request means the
same over gRPC as over HTTP. Health follows readiness; reflection describes what is served.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from control_plane.router.edge import Delta, Edge, RequestStream, RouterState, as_ours, public_message, word
from control_plane.router.requests import RequestStats
from control_plane.router.validation import Validator
from control_plane.wire import inference_pb2 as pb
from control_plane.wire import inference_pb2_grpc as pb_grpc
from engine.base import limits
from engine.base.errors import NotFound, Status, TriptychError

log = logging.getLogger("triptych.router")

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME: Final[str] = pb.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH_NAMES: Final = ("", SERVICE_NAME)  # both mean "takes requests": liveness is the process, and /health

GRPC_CODE: Final[Mapping[Status, grpc.StatusCode]] = {
    Status.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Status.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Status.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Status.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Status.CANCELLED: grpc.StatusCode.CANCELLED,
    Status.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Status.DATA_LOSS: grpc.StatusCode.DATA_LOSS,
    Status.INTERNAL: grpc.StatusCode.INTERNAL,
}
RETRYABLE: Final = (Status.RESOURCE_EXHAUSTED, Status.UNAVAILABLE)


def add_services(server: grpc.aio.Server, service: "InferenceService", health: "ReadinessHealth") -> None:
    """Everything on the public gRPC port."""
    pb_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (SERVICE_NAME, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


class InferenceService(pb_grpc.InferenceServicer):
    """Generate, Abort, GetModelInfo."""

    def __init__(self, edge: Edge, validator: Validator) -> None:
        self._edge = edge
        self._validator = validator

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        label = word(request.request_id)
        try:
            self._edge.check_room()
            stream = self._edge.open(await self._validator.validate(request_fields(request), label=label))
        except Exception as raised:
            error = as_ours(raised)
            self._edge.refused(error, label)
            await abort(context, error)
        with stream:  # also when gRPC cancels this call: the client went away
            await self._respond(stream, context)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        self._edge.abort(request.id)
        return pb.AbortResponse()

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        card = self._edge.card
        return pb.GetModelInfoResponse(model=card.name, max_model_len=card.max_model_len, vocab_size=card.vocab_size)

    async def _respond(self, stream: RequestStream, context: Context) -> None:
        try:
            async with stream.patience():
                error = await self._write_deltas(stream, context)
        except TimeoutError:
            log.debug("response abandoned id=%s", stream.id)
            await context.abort(grpc.StatusCode.CANCELLED, "the client does not read")
        if error is not None:
            await abort(context, error)

    async def _write_deltas(self, stream: RequestStream, context: Context) -> TriptychError | None:
        completion_tokens = 0
        while True:
            try:
                delta = await stream.next()
            except Exception as raised:  # detokenising: a bug fails its own request only (I11)
                return as_ours(raised)
            completion_tokens += len(delta.token_ids)
            if delta.token_ids or (delta.ended and delta.ended.finish):
                await context.write(response_message(stream, delta, completion_tokens))
            if delta.ended is not None:
                return delta.ended.error


class ReadinessHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the base is untyped
    """grpc.health.v1, answered from the router's readiness. The host calls `refresh` on each tick, for watchers."""

    def __init__(self, state: RouterState) -> None:
        self._state = state
        self._announced = state.ready
        self._changed = asyncio.Event()

    def refresh(self) -> None:
        if self._state.ready is not self._announced:
            self._announced = self._state.ready
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Context) -> Any:
        if request.service not in HEALTH_NAMES:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return self._response()

    async def Watch(self, request: Any, context: Context) -> None:
        if request.service not in HEALTH_NAMES:
            await context.write(health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN))
            return
        while True:
            changed = self._changed
            await context.write(self._response())
            await changed.wait()  # as long as the client watches: it ends the call, or the server does

    def _response(self) -> Any:
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=serving if self._state.ready else not_serving)


# -- translation -------------------------------------------------------------------------------------------------------
def request_fields(request: pb.GenerateRequest) -> dict[str, Any]:
    """The fields that are set, under the names HTTP has for them; so both protocols share checks and error texts."""
    fields: dict[str, Any] = {"model": request.model or None, "stream": True}
    prompt = request.WhichOneof("prompt")
    if prompt is not None:
        fields["prompt"] = request.text if prompt == "text" else list(request.tokens.ids)
    sampling = request.sampling
    optional = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "max_tokens": sampling.max_tokens,
    }
    fields |= {name: value for name, value in optional.items() if sampling.HasField(name)}
    fields["stop_token_ids"] = list(sampling.stop_token_ids)
    fields["ignore_eos"] = sampling.ignore_eos
    if request.deadline_ms:
        fields["triptych"] = {"deadline_ms": request.deadline_ms}
    return fields


def response_message(stream: RequestStream, delta: Delta, completion_tokens: int) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        id=stream.id,
        token_ids=delta.token_ids,
        text=delta.text,
        prompt_tokens=len(stream.request.token_ids),
        completion_tokens=completion_tokens,
    )
    if delta.ended is not None and delta.ended.finish is not None:
        response.finish_reason = delta.ended.finish.value
        response.stats.CopyFrom(stats_message(delta.ended.stats))
    return response


def stats_message(stats: RequestStats) -> pb.RequestStats:
    return pb.RequestStats(
        prefill_worker=stats.prefill_worker,
        decode_worker=stats.decode_worker,
        encode_workers=stats.encode_workers,
        codec=stats.codec,
        kv_bytes_raw=stats.kv_bytes_raw,
        kv_bytes_wire=stats.kv_bytes_wire,
        attempts=stats.attempts,
        phase_ms=stats.phase_ms,
    )


async def abort(context: Context, error: TriptychError) -> NoReturn:
    """End the call with the error's code; the retry hint travels as trailing metadata."""
    code = grpc.StatusCode.NOT_FOUND if isinstance(error, NotFound) else GRPC_CODE[error.status]
    retry_after_ms = str(error.retry_after_ms or limits.RETRY_AFTER_MS)
    trailers = (("retry-after-ms", retry_after_ms),) if error.status in RETRYABLE else ()
    await context.abort(code, public_message(error), trailers)
