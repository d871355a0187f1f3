"""gRPC `vllm.grpc.engine.VllmEngine`: what gateways speak to vLLM, spoken by a whole cluster of ours.

To its caller we are one engine: one rank, one queue, one KV memory. Text does not come back, ids do. The protocol is
that of the package smg-grpc-proto; what its comments leave open is answered as vLLM's own servicer does
(lightseekorg/smg, grpc_servicer/smg_grpc_servicer/vllm/servicer.py):

- a streamed choice is chunks, each with what is new, then one `complete`; an unstreamed one is its `complete` alone;
- proto3's zero means "not set" in `top_p`, `repetition_penalty` and `n`, where no zero could be meant;
- without `max_tokens` the answer to ids may fill the context; that to a text has the default of completions.

What does not belong here: what a client may ask for (`validation`), and what we cannot do under this protocol: images,
embeddings, profiles, KV events and other engines' KV transfers are refused by name.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

import grpc
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc

from control_plane.router.access.tenants import Tenant
from control_plane.router.answers.choice import Delta, joined
from control_plane.router.answers.logprobs import prompt_scores
from control_plane.router.answers.request_stream import News, RequestStream
from control_plane.router.edge import Edge, RouterState
from control_plane.router.grpc.calls import Answer, Context, Reception, answered, at_most, respond
from control_plane.router.grpc.health import serves
from control_plane.router.grpc.inference_service import streams, usage
from control_plane.router.grpc.server_facts import ServerFacts
from control_plane.router.grpc.tokenizer_bundle import CHUNK_BYTES, TokenizerBundle
from control_plane.router.requests import PromptScored
from control_plane.router.validation.fields import refuse
from control_plane.router.validation.validator import ValidatedRequest
from engine.base import limits
from engine.base.errors import Cancelled, FailedPrecondition, PermissionDenied
from engine.types import TokenLogprobs

SERVICE_NAME: Final[str] = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name


def not_served(text: str) -> Callable[[Any, Any, Context], Awaitable[None]]:
    async def refuse_call(service: Any, request: Any, context: Context) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)

    return refuse_call


class VllmEngineService(pb_grpc.VllmEngineServicer):  # type: ignore[misc]  # the base is untyped
    """One engine, as its gateway sees it."""

    def __init__(
        self, reception: Reception, edge: Edge, state: RouterState, facts: ServerFacts, wall_s: Callable[[], float]
    ) -> None:
        self._reception = reception
        self._edge = edge
        self._state = state
        self._facts = facts
        self._wall_s = wall_s
        self._live = LiveRequests()
        self._tokenizer = TokenizerBundle(facts.tokenizer) if facts.tokenizer is not None else None

    # -- requests ------------------------------------------------------------------------------------------------------
    @answered
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        context_tokens = self._edge.card.max_model_len
        stream = await self._reception.open(
            context, request.request_id, lambda: request_fields(request, context_tokens=context_tokens)
        )
        with stream, self._live.named(request.request_id, stream):
            answer: Answer = StreamedAnswer(stream) if request.stream else WholeAnswer(stream)
            await respond(context, stream, answer)

    @answered
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        tenant = self._reception.tenant(context)
        for request_id in counted_ids(request.request_ids):
            self._live.close(tenant, request_id)
        return pb.AbortResponse()

    Embed = not_served("Embed: this server generates text, it does not embed it")
    SubscribeKvEvents = not_served("SubscribeKvEvents: KV events are not published")
    StartProfile = not_served("StartProfile: there is no profiler in this server")
    StopProfile = not_served("StopProfile: there is no profiler in this server")

    # -- facts ---------------------------------------------------------------------------------------------------------
    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        """Without a key, as every probe."""
        ready = self._state.ready
        return pb.HealthCheckResponse(healthy=ready, message="" if ready else "a role has no worker that serves")

    @answered
    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        """Names and no paths: where files lie here is nobody's business."""
        self._reception.tenant(context)
        card = self._edge.card
        return pb.GetModelInfoResponse(
            model_path=card.name,
            served_model_name=card.name,
            is_generation=True,
            max_context_length=card.max_model_len,
            max_req_input_len=min(limits.PROMPT_TOKENS_MAX, card.max_model_len - 1),
            vocab_size=card.vocab_size,
            eos_token_ids=card.eos_token_ids,
        )

    @answered
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        self._reception.tenant(context)
        facts = self._facts
        return pb.GetServerInfoResponse(
            active_requests=self._edge.in_flight,
            is_paused=not self._state.ready,
            uptime_seconds=self._reception.uptime_s,
            server_type="triptych",
            data_parallel_size=1,
            kv_cache_dtype=facts.model_dtype,
            block_size=facts.block_size,
            model_dtype=facts.model_dtype,
            max_num_seqs=self._edge.config.requests_max,
        )

    @answered
    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        self._reception.tenant(context)
        now = datetime.fromtimestamp(self._wall_s(), UTC)
        return pb.GetLoadsResponse(
            timestamp=now.isoformat(), version=self._facts.version, dp_rank_count=1, loads=[self._load()]
        )

    def _load(self) -> pb.SchedulerLoad:
        """Of the cluster as one engine. Whatever is accepted and in no worker's step yet is waiting."""
        serving = [worker for worker in self._state.workers() if serves(worker)]
        running, accepted = sum(worker.running for worker in serving), self._edge.in_flight
        used = sum(worker.total_columns - worker.free_columns for worker in serving)
        counters = self._state.counters()
        queries = counters.get(("prefix_cache_queries", ()), 0)
        return pb.SchedulerLoad(
            num_running_reqs=running,
            num_waiting_reqs=max(0, accepted - running),
            num_total_reqs=accepted,
            num_used_tokens=used * self._facts.block_size,
            max_total_num_tokens=sum(worker.total_columns for worker in serving) * self._facts.block_size,
            token_usage=usage(serving),
            cache_hit_rate=counters.get(("prefix_cache_hits", ()), 0) / queries if queries else 0.0,
            max_running_requests=self._edge.config.requests_max,
        )

    # -- files and caches ----------------------------------------------------------------------------------------------
    @answered
    async def GetTokenizer(self, request: common.GetTokenizerRequest, context: Context) -> None:
        self._reception.tenant(context)
        if self._tokenizer is None:
            raise FailedPrecondition("GetTokenizer: this model has no tokenizer files")
        try:
            async with asyncio.timeout(limits.READ_GRACE_MS / 1_000):
                await self._send_tokenizer(await self._tokenizer.archive(), context)
        except TimeoutError:
            raise Cancelled("the client does not read") from None

    async def _send_tokenizer(self, archive: tuple[bytes, str], context: Context) -> None:
        data, digest = archive
        for start in range(0, len(data), CHUNK_BYTES):
            last = start + CHUNK_BYTES >= len(data)
            chunk = common.GetTokenizerChunk(data=data[start : start + CHUNK_BYTES], sha256=digest if last else "")
            await context.write(chunk)

    @answered
    async def FlushCache(self, request: common.FlushCacheRequest, context: Context) -> common.FlushCacheResponse:
        """Requests under way keep what they hold, so there is nothing to wait for."""
        if not self._reception.tenant(context).admin:
            raise PermissionDenied("FlushCache: needs an admin's key")
        self._edge.reset_cache()
        return common.FlushCacheResponse(success=True, message="cached KV that no request holds is being forgotten")


class LiveRequests:
    """Requests under way by the ids that their clients gave them, which are unique to nobody but the client.

    Bounded by the edge's limit of requests: an entry leaves with its call.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[str, str], set[RequestStream]] = {}

    @contextmanager
    def named(self, request_id: str, stream: RequestStream) -> Iterator[None]:
        key = stream.request.tenant, request_id
        self._streams.setdefault(key, set()).add(stream)
        try:
            yield
        finally:
            self._streams[key].discard(stream)
            if not self._streams[key]:
                del self._streams[key]

    def close(self, tenant: Tenant, request_id: str) -> None:
        """All of the tenant's that bear this id; none is no error. The empty one is no id, however many have it."""
        for stream in self._streams.get((tenant.name, request_id), ()) if request_id else ():
            stream.close("aborted by request")

    def __len__(self) -> int:
        return len(self._streams)


def counted_ids(request_ids: Iterable[str]) -> list[str]:
    ids = at_most(request_ids, limits.ROUTER_REQUESTS_MAX)
    if len(ids) > limits.ROUTER_REQUESTS_MAX:
        raise refuse("request_ids", f"at most {limits.ROUTER_REQUESTS_MAX} ids")
    return ids


# -- a request ---------------------------------------------------------------------------------------------------------
NOT_SERVED: Final = {
    "mm_inputs": "this model reads text only",
    "media_refs": "this model reads text only",
    "kv_transfer_params": "KV is moved between this server's own workers only",
}
AS_THEY_ARE: Final = (  # zero is what their absence means
    *("top_k", "min_p", "frequency_penalty", "presence_penalty", "min_tokens"),
    *("skip_special_tokens", "ignore_eos", "include_stop_str_in_output"),
)
ZERO_IS_UNSET: Final = ("top_p", "repetition_penalty", "n")
OPTIONAL: Final = ("temperature", "max_tokens", "logprobs", "prompt_logprobs", "seed", "truncate_prompt_tokens")
CONSTRAINTS: Final = {  # -> the key of `structured_outputs`
    "json_schema": "json",
    "regex": "regex",
    "grammar": "grammar",
    "json_object": "json_object",
    "choice": "choice",
    "structural_tag": "structural_tag",  # refused by name
}


def request_fields(request: pb.GenerateRequest, *, context_tokens: int) -> dict[str, Any]:
    """The fields under the names HTTP has for them."""
    refuse_not_served(request)
    sampling = request.sampling_params
    fields = prompt_fields(request) | sampling_fields(sampling)
    fields["stream"] = request.stream and streams(sampling)
    if "max_tokens" not in fields:
        fields["max_tokens"] = longest_answer(fields, context_tokens)
    return fields


def refuse_not_served(request: pb.GenerateRequest) -> None:
    for field, reason in NOT_SERVED.items():
        if request.HasField(field):
            raise refuse(field, f"not served: {reason}")
    if request.extra_mm_inputs:
        raise refuse("extra_mm_inputs", f"not served: {NOT_SERVED['mm_inputs']}")
    if request.kv_transfer_params_json not in ("", "{}"):
        raise refuse("kv_transfer_params_json", f"not served: {NOT_SERVED['kv_transfer_params']}")
    if request.data_parallel_rank:
        raise refuse("data_parallel_rank", "there is one rank here, 0")
    if len(request.request_id) > limits.REQUEST_ID_CHARACTERS_MAX:
        raise refuse("request_id", f"at most {limits.REQUEST_ID_CHARACTERS_MAX} characters")


def prompt_fields(request: pb.GenerateRequest) -> dict[str, Any]:
    match request.WhichOneof("input"):
        case "tokenized":
            return {"prompt": at_most(request.tokenized.input_ids, limits.PROMPT_TOKENS_MAX)}
        case "text":
            return {"prompt": request.text}
        case _:
            return {}


def sampling_fields(sampling: pb.SamplingParams) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(sampling, name) for name in AS_THEY_ARE}
    fields |= {name: value for name in ZERO_IS_UNSET if (value := getattr(sampling, name))}
    fields |= {name: getattr(sampling, name) for name in OPTIONAL if sampling.HasField(name)}
    fields["stop"] = at_most(sampling.stop, limits.STOP_STRINGS_MAX)
    fields["stop_token_ids"] = at_most(sampling.stop_token_ids, limits.STOP_TOKEN_IDS_MAX)
    biases = at_most(sampling.logit_bias.items(), limits.LOGIT_BIAS_MAX)
    fields["logit_bias"] = {str(token): bias for token, bias in biases}
    constraint = sampling.WhichOneof("constraint")
    if constraint is not None:
        fields["structured_outputs"] = {CONSTRAINTS[constraint]: constraint_value(sampling, constraint)}
    return fields


def constraint_value(sampling: pb.SamplingParams, name: str) -> Any:
    """Of choices no more than there may be bytes: each is at least one."""
    choices = sampling.choice.choices
    return at_most(choices, limits.CONSTRAINT_BYTES_MAX) if name == "choice" else getattr(sampling, name)


def longest_answer(fields: dict[str, Any], context_tokens: int) -> int | None:
    """What the prompt's ids leave of the context, and what one piece can hold the scores of. How many ids a text has is
    not known yet."""
    prompt = fields.get("prompt")
    if not isinstance(prompt, list):
        return None
    kept = fields.get("truncate_prompt_tokens", -1)
    tokens = min(len(prompt), kept) if kept > 0 else len(prompt)
    room = min(limits.OUTPUT_TOKENS_MAX, context_tokens - tokens)
    if "logprobs" in fields and not fields["stream"]:
        numbers = max(1, fields.get("n", 1) * (1 + fields["logprobs"]))
        room = min(room, limits.LOGPROBS_PER_ANSWER_MAX // numbers)
    return max(room, 0) or None  # of a prompt that does not fit something else is wrong


# -- its answer --------------------------------------------------------------------------------------------------------
class StreamedAnswer:
    """Chunks of what is new, then a `complete` for each choice.

    A `complete` repeats the choice's ids, of which the protocol wants all, and not its log-probabilities, which who
    reads a stream has added up. How much of the prompt was cached is known with the request's ending: those who end
    before it do not say.
    """

    def __init__(self, stream: RequestStream) -> None:
        self._request = stream.request
        self._output_ids: list[list[int]] = [[] for _ in range(stream.request.choices)]
        self._opened: set[int] = set()  # choices whose first chunk is written
        self._scored: list[PromptScored] = []

    def responses(self, news: News) -> Iterator[pb.GenerateResponse]:
        self._scored += news.scored
        for delta in news.deltas:
            self._output_ids[delta.choice] += delta.token_ids
            if delta.token_ids:
                yield pb.GenerateResponse(chunk=self._chunk(delta))
            if delta.finish is not None:
                complete = complete_message(self._request, delta, self._output_ids[delta.choice])
                if news.ended is not None:
                    complete.cached_tokens = news.ended.stats.cached_tokens
                yield pb.GenerateResponse(complete=complete)

    def _chunk(self, delta: Delta) -> pb.GenerateStreamChunk:
        chunk = pb.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=len(self._request.token_ids),
            completion_tokens=len(delta.token_ids),
            output_logprobs=output_logprobs(delta),
            index=delta.choice,
        )
        if delta.choice not in self._opened:
            self._opened.add(delta.choice)
            add_input_logprobs(chunk, self._request, self._scored)
        return chunk


class WholeAnswer:
    """One `complete` for each choice, choices in order, once all are over."""

    def __init__(self, stream: RequestStream) -> None:
        self._request = stream.request
        self._deltas: list[list[Delta]] = [[] for _ in range(stream.request.choices)]
        self._scored: list[PromptScored] = []

    def responses(self, news: News) -> Iterator[pb.GenerateResponse]:
        self._scored += news.scored
        for delta in news.deltas:
            self._deltas[delta.choice].append(delta)
        if news.ended is None or news.ended.error is not None:
            return
        for choice in map(joined, self._deltas):
            complete = complete_message(self._request, choice, choice.token_ids)
            complete.cached_tokens = news.ended.stats.cached_tokens
            if choice.logprobs:
                complete.output_logprobs.CopyFrom(output_logprobs(choice))
            add_input_logprobs(complete, self._request, self._scored)
            yield pb.GenerateResponse(complete=complete)


def complete_message(request: ValidatedRequest, delta: Delta, output_ids: Sequence[int]) -> pb.GenerateComplete:
    complete = pb.GenerateComplete(
        output_ids=output_ids,
        finish_reason=delta.finish.value if delta.finish is not None else "",
        prompt_tokens=len(request.token_ids),
        completion_tokens=len(output_ids),
        index=delta.choice,
    )
    if isinstance(delta.stop, str):
        complete.matched_stop_str = delta.stop
    elif delta.stop is not None:
        complete.matched_token_id = delta.stop
    return complete


def output_logprobs(delta: Delta) -> pb.OutputLogProbs | None:
    if not delta.logprobs:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[score.logprob for score in delta.logprobs],
        token_ids=delta.token_ids,
        top_logprobs=[top_message(score) for score in delta.logprobs],
    )


def add_input_logprobs(message: Any, request: ValidatedRequest, scored: Sequence[PromptScored]) -> None:
    """One entry per token of the prompt; the first one's is empty, for nothing came before it."""
    if request.prompt_logprobs is None:
        return
    scores = prompt_scores(len(request.token_ids), scored)
    message.input_logprobs.CopyFrom(
        pb.InputLogProbs(
            token_logprobs=[
                pb.InputTokenLogProb() if score is None else pb.InputTokenLogProb(value=score.logprob)
                for score in scores
            ],
            token_ids=request.token_ids,
            top_logprobs=[pb.TopLogProbs() if score is None else top_message(score) for score in scores],
        )
    )


def top_message(score: TokenLogprobs) -> pb.TopLogProbs:
    return pb.TopLogProbs(values=[logprob for _, logprob in score.top], token_ids=[token for token, _ in score.top])
