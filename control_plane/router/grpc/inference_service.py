"""gRPC `triptych.v1.Inference`: translates messages to the edge's values and back.

No decision, no timer, no retry. Limits and texts are `validation`'s, a request's life is `edge`'s: a request means the
same over gRPC as over HTTP. How a call comes in and how it ends is `grpc_calls`'s.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

import msgspec

from control_plane.router.answers.choice import Delta
from control_plane.router.answers.request_stream import News, RequestStream
from control_plane.router.edge import Edge, RouterState
from control_plane.router.grpc.calls import Context, Reception, answered, at_most, respond
from control_plane.router.grpc.health import serves
from control_plane.router.grpc.server_facts import ServerFacts
from control_plane.router.requests import PromptScored, RequestStats, WorkerView
from control_plane.router.validation.fields import refuse
from control_plane.wire import inference_pb2 as pb
from control_plane.wire import inference_pb2_grpc as pb_grpc
from control_plane.wire.session import WIRE_VERSION
from engine.base import limits
from engine.types import TokenLogprobs

SERVICE_NAME: Final[str] = pb.DESCRIPTOR.services_by_name["Inference"].full_name


class InferenceService(pb_grpc.InferenceServicer):
    """Generate, Abort, and what a client may want to know first."""

    def __init__(self, reception: Reception, edge: Edge, state: RouterState, facts: ServerFacts) -> None:
        self._reception = reception
        self._edge = edge
        self._state = state
        self._facts = facts

    @answered
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        stream = await self._reception.open(context, request.request_id, lambda: request_fields(request))
        with stream:  # also when gRPC cancels this call: the client went away
            await respond(context, stream, ResponseWriter(stream))

    @answered
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        self._edge.abort(request.id, self._reception.tenant(context))
        return pb.AbortResponse()

    @answered
    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        self._reception.tenant(context)
        card = self._edge.card
        return pb.GetModelInfoResponse(
            model=card.name,
            max_model_len=card.max_model_len,
            vocab_size=card.vocab_size,
            eos_token_ids=card.eos_token_ids,
            max_prompt_tokens=min(limits.PROMPT_TOKENS_MAX, card.max_model_len - 1),
            max_choices=limits.CHOICES_MAX,
            max_logprobs=limits.LOGPROBS_MAX,
            model_dtype=self._facts.model_dtype,
            max_images=card.images_max,
        )

    @answered
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        self._reception.tenant(context)
        facts = self._facts
        return pb.GetServerInfoResponse(
            version=facts.version,
            wire_version=WIRE_VERSION,
            uptime_seconds=self._reception.uptime_s,
            model=self._edge.card.name,
            block_size=facts.block_size,
            codecs=facts.codecs,
            codec=facts.codec,
            ready=self._state.ready,
            active_requests=self._edge.in_flight,
            max_requests=self._edge.config.requests_max,
        )

    @answered
    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        self._reception.tenant(context)
        workers = self._state.workers()
        serving = [worker for worker in workers if serves(worker)]
        return pb.GetLoadsResponse(
            workers=map(worker_load, workers),
            active_requests=self._edge.in_flight,
            num_running_reqs=sum(worker.running for worker in serving),
            num_waiting_reqs=sum(worker.waiting for worker in serving),
            token_usage=usage(serving),
        )


def worker_load(worker: WorkerView) -> pb.WorkerLoad:
    return pb.WorkerLoad(
        id=worker.id,
        name=worker.name,
        roles=worker.roles,
        state=worker.state,
        connected=worker.connected,
        num_running_reqs=worker.running,
        num_waiting_reqs=worker.waiting,
        free_columns=worker.free_columns,
        total_columns=worker.total_columns,
        cached_columns=worker.cached_columns,
    )


def usage(workers: Sequence[WorkerView]) -> float:
    """The part of their KV memory that is in use; cached KV that no request holds is not."""
    total = sum(worker.total_columns for worker in workers)
    return max(0.0, 1 - sum(worker.free_columns for worker in workers) / total) if total else 0.0


# -- a request ---------------------------------------------------------------------------------------------------------
OPTIONAL: Final = (  # the names are the same over HTTP
    *("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "n", "logprobs", "prompt_logprobs"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "truncate_prompt_tokens"),
    *("skip_special_tokens", "include_stop_str_in_output"),
)
REPEATED: Final = {
    "stop": limits.STOP_STRINGS_MAX,
    "stop_token_ids": limits.STOP_TOKEN_IDS_MAX,
    "allowed_token_ids": limits.ALLOWED_TOKEN_IDS_MAX,
    "bad_words": limits.BAD_WORDS_MAX,
}


def request_fields(request: pb.GenerateRequest) -> dict[str, Any]:
    """The fields that are set, under the names HTTP has for them."""
    fields = sampling_fields(request.sampling) | prompt_fields(request)
    fields |= {name: getattr(request, name) for name in ("add_special_tokens", "cache_salt") if request.HasField(name)}
    return fields | {
        "model": request.model or None,
        "priority": request.priority,
        "return_token_ids": request.return_token_ids,
        "stream": streams(request.sampling),
        "triptych": {
            "codec": request.codec or None,
            "kl_budget": request.kl_budget if request.HasField("kl_budget") else None,
            "deadline_ms": request.deadline_ms or None,
            "slo": _slo_fields(request),
        },
    }


def _slo_fields(request: pb.GenerateRequest) -> dict[str, int] | None:
    names = ("ttft_slo_ms", "tpot_slo_ms")
    return {name.replace("_slo", ""): getattr(request, name) for name in names if request.HasField(name)} or None


def streams(sampling: Any) -> bool:
    """Log-probabilities in pieces have no limit; HTTP gives those of the prompt in one piece only."""
    return not sampling.HasField("prompt_logprobs")


def prompt_fields(request: pb.GenerateRequest) -> dict[str, Any]:
    match request.WhichOneof("prompt"):
        case "text":
            return {"prompt": request.text}
        case "tokens":
            return {"prompt": at_most(request.tokens.ids, limits.PROMPT_TOKENS_MAX)}
        case "chat":
            return chat_fields(request.chat) | chat_logprobs(request.sampling)
        case _:
            return {}


def chat_fields(chat: pb.Chat) -> dict[str, Any]:
    messages = at_most(chat.messages, limits.MESSAGES_MAX)
    fields: dict[str, Any] = {"messages": [{"role": said.role, "content": content(said)} for said in messages]}
    switches = ("add_generation_prompt", "continue_final_message")
    fields |= {name: getattr(chat, name) for name in switches if chat.HasField(name)}
    if chat.chat_template_kwargs_json:
        fields["chat_template_kwargs"] = _json_untrusted("chat_template_kwargs_json", chat.chat_template_kwargs_json)
    return fields


def content(said: pb.ChatMessage) -> str | list[dict[str, Any]]:
    if not said.parts:
        return said.content
    if said.content:
        raise refuse("content", "and parts cannot both be given")
    return list(map(_part, at_most(said.parts, limits.MESSAGE_PARTS_MAX)))


def _part(part: pb.ContentPart) -> dict[str, Any]:
    """As HTTP has it; only here an image may be a file."""
    match part.WhichOneof("part"):
        case "text":
            return {"type": "text", "text": part.text}
        case "image":
            source = part.image.WhichOneof("source")
            return {"type": "image_url", "image_url": getattr(part.image, source) if source else None}
        case _:
            return {"type": ""}


def chat_logprobs(sampling: pb.GenerateSampling) -> dict[str, Any]:
    """OpenAI's chat has a switch and a number where completions have the number."""
    return {"logprobs": True, "top_logprobs": sampling.logprobs} if sampling.HasField("logprobs") else {}


def _json_untrusted(field: str, text: str) -> Any:
    if len(text) > limits.BODY_BESIDE_PROMPT_BYTES_MAX:
        raise refuse(field, f"at most {limits.BODY_BESIDE_PROMPT_BYTES_MAX} bytes")
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise refuse(field, "must be one JSON object") from None


def sampling_fields(sampling: pb.GenerateSampling) -> dict[str, Any]:
    fields = {name: getattr(sampling, name) for name in OPTIONAL if sampling.HasField(name)}
    fields |= {
        name: at_most(values, count_max) for name, count_max in REPEATED.items() if (values := getattr(sampling, name))
    }
    fields["ignore_eos"] = sampling.ignore_eos
    biases = at_most(sampling.logit_bias.items(), limits.LOGIT_BIAS_MAX)
    fields["logit_bias"] = {str(token): bias for token, bias in biases}
    constraint = sampling.WhichOneof("constraint")
    if constraint is not None:
        fields["structured_outputs"] = {constraint.removesuffix("_schema"): constraint_value(sampling, constraint)}
    return fields


def constraint_value(sampling: pb.GenerateSampling, name: str) -> Any:
    """Of choices no more than there may be bytes: each is at least one."""
    return at_most(sampling.choice.values, limits.CONSTRAINT_BYTES_MAX) if name == "choice" else getattr(sampling, name)


# -- its answer --------------------------------------------------------------------------------------------------------
class ResponseWriter:
    """The messages of one request's answer."""

    def __init__(self, stream: RequestStream) -> None:
        self._id = stream.id
        self._request = stream.request
        self._completion_tokens = [0] * stream.request.choices
        self._prompt_is_due = stream.request.return_token_ids

    def responses(self, news: News) -> Iterator[pb.GenerateResponse]:
        for response in self._responses(news):
            if self._prompt_is_due:
                response.prompt_token_ids.extend(self._request.token_ids)
                self._prompt_is_due = False
            yield response

    def _responses(self, news: News) -> Iterator[pb.GenerateResponse]:
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
