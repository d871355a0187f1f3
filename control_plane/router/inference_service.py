"""gRPC `triptych.v1.Inference`: translates messages to the edge's values and back, and statuses to gRPC codes.

No decision, no timer, no retry. Limits and texts are `validation`'s, a request's life is `edge`'s: a request means the
same over gRPC as over HTTP. Health follows readiness; reflection describes what is served.
"""

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Final, NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from control_plane.router.choice import Delta
from control_plane.router.client_errors import as_ours, public_message
from control_plane.router.edge import Edge, RouterState, word
from control_plane.router.request_stream import News, RequestStream
from control_plane.router.requests import PromptScored, RequestStats
from control_plane.router.validation import Validator
from control_plane.wire import inference_pb2 as pb
from control_plane.wire import inference_pb2_grpc as pb_grpc
from engine.base import limits
from engine.base.errors import NotFound, Status, TriptychError
from engine.types import TokenLogprobs

log = logging.getLogger("triptych.router")

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE_NAME: Final[str] = pb.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH_NAMES: Final = ("", SERVICE_NAME)  # both mean "takes requests": liveness is the process, and /health

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
        answer = ResponseWriter(stream)
        while True:
            news = await stream.next()
            for response in answer.responses(news):
                await context.write(response)
            if news.ended is not None:
                return news.ended.error


class ReadinessHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the base is untyped
    """grpc.health.v1, answered from the router's readiness. While it is `watched` its owner calls `refresh` often; a
    router that nobody watches is left to sleep."""

    def __init__(self, state: RouterState) -> None:
        self._state = state
        self._announced = state.ready
        self._changed = asyncio.Event()
        self._watchers = 0
        self._watched = asyncio.Event()

    async def watched(self) -> None:
        """Returns when, or as soon as, somebody watches."""
        await self._watched.wait()

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
        with self._watching():
            while True:
                changed = self._changed
                await context.write(self._response())
                await changed.wait()  # as long as the client watches: it ends the call, or the server does

    @contextmanager
    def _watching(self) -> Iterator[None]:
        self.refresh()  # nobody has for as long as nobody watched
        self._watchers += 1
        self._watched.set()
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._watched.clear()

    def _response(self) -> Any:
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=serving if self._state.ready else not_serving)


# -- translation -------------------------------------------------------------------------------------------------------
def request_fields(request: pb.GenerateRequest) -> dict[str, Any]:
    """The fields that are set, under the names HTTP has for them; so both protocols share checks and error texts."""
    fields: dict[str, Any] = {"model": request.model or None}
    prompt = request.WhichOneof("prompt")
    if prompt is not None:
        fields["prompt"] = request.text if prompt == "text" else list(request.tokens.ids)
    fields |= {name: getattr(request, name) for name in ("add_special_tokens", "cache_salt") if request.HasField(name)}
    fields["priority"] = request.priority
    fields["triptych"] = {
        "codec": request.codec or None,
        "kl_budget": request.kl_budget if request.HasField("kl_budget") else None,
        "deadline_ms": request.deadline_ms or None,
    }
    return fields | sampling_fields(request.sampling)


OPTIONAL: Final = (  # the names are the same over HTTP
    *("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "n", "logprobs", "prompt_logprobs"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "truncate_prompt_tokens"),
    *("skip_special_tokens", "include_stop_str_in_output"),
)
REPEATED: Final = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words")


def sampling_fields(sampling: pb.GenerateSampling) -> dict[str, Any]:
    fields = {name: getattr(sampling, name) for name in OPTIONAL if sampling.HasField(name)}
    fields |= {name: list(values) for name in REPEATED if (values := getattr(sampling, name))}
    fields["ignore_eos"] = sampling.ignore_eos
    fields["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    constraint = sampling.WhichOneof("constraint")
    if constraint is not None:
        fields["structured_outputs"] = {constraint.removesuffix("_schema"): constraint_value(sampling, constraint)}
    return fields


def constraint_value(sampling: pb.GenerateSampling, name: str) -> Any:
    return list(sampling.choice.values) if name == "choice" else getattr(sampling, name)


class ResponseWriter:
    """The messages of one request's answer."""

    def __init__(self, stream: RequestStream) -> None:
        self._id = stream.id
        self._request = stream.request
        self._completion_tokens = [0] * stream.request.choices

    def responses(self, news: News) -> Iterator[pb.GenerateResponse]:
        for scored in news.scored:
            yield self._of_prompt(scored)
        for delta in news.deltas:
            response = self._of_choice(delta)
            if delta is news.deltas[-1] and news.ended is not None and news.ended.finish is not None:
                response.stats.CopyFrom(stats_message(news.ended.stats))
                response.cached_tokens = news.ended.stats.cached_tokens
            yield response

    def _of_prompt(self, scored: PromptScored) -> pb.GenerateResponse:
        ids = self._request.token_ids[scored.start : scored.start + len(scored.logprobs)]
        input_logprobs = pb.InputLogProbs(start=scored.start, **logprob_lists(ids, scored.logprobs))
        return pb.GenerateResponse(
            id=self._id, prompt_tokens=len(self._request.token_ids), input_logprobs=input_logprobs
        )

    def _of_choice(self, delta: Delta) -> pb.GenerateResponse:
        self._completion_tokens[delta.choice] += len(delta.token_ids)
        response = pb.GenerateResponse(
            id=self._id,
            index=delta.choice,
            token_ids=delta.token_ids,
            text=delta.text,
            finish_reason=delta.finish.value if delta.finish is not None else "",
            prompt_tokens=len(self._request.token_ids),
            completion_tokens=self._completion_tokens[delta.choice],
        )
        if delta.logprobs:
            response.output_logprobs.CopyFrom(pb.OutputLogProbs(**logprob_lists(delta.token_ids, delta.logprobs)))
        if isinstance(delta.stop, str):
            response.matched_stop_str = delta.stop
        elif delta.stop is not None:
            response.matched_token_id = delta.stop
        return response


def logprob_lists(token_ids: Sequence[int], scores: Sequence[TokenLogprobs]) -> dict[str, Any]:
    return {
        "token_logprobs": [score.logprob for score in scores],
        "token_ids": token_ids,
        "top_logprobs": [
            pb.TopLogProbs(values=[logprob for _, logprob in score.top], token_ids=[token for token, _ in score.top])
            for score in scores
        ],
    }


def stats_message(stats: RequestStats) -> pb.RequestStats:
    return pb.RequestStats(**asdict(stats))


async def abort(context: Context, error: TriptychError) -> NoReturn:
    """End the call with the error's code; the retry hint travels as trailing metadata."""
    code = grpc.StatusCode.NOT_FOUND if isinstance(error, NotFound) else GRPC_CODE[error.status]
    retry_after_ms = str(error.retry_after_ms or limits.RETRY_AFTER_MS)
    trailers = (("retry-after-ms", retry_after_ms),) if error.status in RETRYABLE else ()
    await context.abort(code, public_message(error), trailers)
