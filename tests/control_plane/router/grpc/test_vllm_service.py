"""What a gateway that speaks to vLLM gets from us: over a real server on loopback, with the scripted core behind it."""

import hashlib
import io
import zipfile
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc as pb_grpc

from control_plane.router.grpc.server_facts import ServerFacts
from control_plane.router.grpc.vllm_service import LiveRequests, VllmEngineService, request_fields
from control_plane.router.requests import Cancel, ResetCache
from engine.base.errors import InvalidArgument, Unavailable
from engine.types import Constraint, ConstraintKind, FinishReason
from tests.control_plane.router.edge_fakes import WORKER, FakeCore, Router, answers, in_turns, says, score
from tests.control_plane.router.grpc_fakes import ACME, KEYS, OPS, OTHER, Server, refusal, running

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.fixture
async def served() -> AsyncIterator[Server]:
    async with running(Router()) as server:
        yield server


@pytest.fixture
async def guarded() -> AsyncIterator[Server]:
    async with running(Router(), keys=KEYS) as server:
        yield server


def stub_of(server: Server) -> Any:
    return pb_grpc.VllmEngineStub(server.channel)


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"tokenized": pb.TokenizedInput(input_ids=[1, 2, 3]), **fields})


async def generated(server: Server, message: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [response async for response in stub_of(server).Generate(message)]


def fields_of(**sampling: Any) -> dict[str, Any]:
    return request_fields(request(sampling_params=pb.SamplingParams(**sampling)), context_tokens=64)


# -- answers -----------------------------------------------------------------------------------------------------------
async def test_a_stream_is_chunks_and_one_complete(served: Server) -> None:
    served.router.core.script = says((0, [5], None), (0, [6, 7], LENGTH))
    *chunks, last = await generated(served, request(stream=True))
    assert [response.WhichOneof("response") for response in chunks] == ["chunk"] * len(chunks)
    assert [token for response in chunks for token in response.chunk.token_ids] == [5, 6, 7]
    assert [response.chunk.completion_tokens for response in chunks] == [1, 2]  # what is new, as vLLM counts them
    complete = last.complete
    assert (complete.output_ids, complete.finish_reason) == ([5, 6, 7], "length")
    assert (complete.prompt_tokens, complete.completion_tokens, complete.cached_tokens) == (3, 3, 2)


async def test_without_stream_every_choice_is_one_complete(served: Server) -> None:
    served.router.core.script = says((1, [7], None), (0, [5], None), (1, [8], LENGTH), (0, [42], STOP))
    sampling = pb.SamplingParams(n=2, stop_token_ids=[42])
    responses = await generated(served, request(sampling_params=sampling))
    first, second = (response.complete for response in responses)
    assert (first.index, first.output_ids, first.finish_reason, first.matched_token_id) == (0, [5, 42], "stop", 42)
    assert (second.index, second.output_ids, second.finish_reason) == (1, [7, 8], "length")
    assert second.WhichOneof("matched_stop") is None
    assert [complete.cached_tokens for complete in (first, second)] == [2, 2]


async def test_streamed_choices_are_told_apart_and_their_stops_named(served: Server) -> None:
    served.router.core.script = says((1, [9], None), (0, [5], None), (1, [7], None), (0, [6], LENGTH))
    sampling = pb.SamplingParams(n=2, stop=[" 7"])
    responses = await generated(served, request(stream=True, sampling_params=sampling))
    for choice, ids in ((0, [5, 6]), (1, [9, 7])):
        chunks = [r.chunk for r in responses if r.HasField("chunk") and r.chunk.index == choice]
        assert [token for chunk in chunks for token in chunk.token_ids] == ids
        (complete,) = [r.complete for r in responses if r.HasField("complete") and r.complete.index == choice]
        assert complete.output_ids == ids
        assert complete.matched_stop_str == (" 7" if choice else "")


async def test_an_answer_without_tokens_is_a_complete(served: Server) -> None:
    for stream in (True, False):
        served.router.core.script = answers(ending=LENGTH)
        (only,) = await generated(served, request(stream=stream, sampling_params=pb.SamplingParams(max_tokens=0)))
        assert (only.complete.output_ids, only.complete.finish_reason) == ([], "length")


@pytest.mark.parametrize("stream", [True, False])
async def test_logprobs_of_prompt_and_output(served: Server, stream: bool) -> None:
    scored, sampled = score(-0.5, (9, -0.25), (2, -0.5)), score(-1.0, (5, -1.0))

    def script(core: FakeCore, key: int) -> None:
        tokens = (partial(core.tokens, key, 5, finish=finish, logprobs=[sampled]) for finish in (None, LENGTH))
        in_turns([partial(core.scored, key, 1, scored, scored), *tokens])

    served.router.core.script = script
    sampling = pb.SamplingParams(logprobs=1, prompt_logprobs=2)
    first, *rest = await generated(served, request(stream=stream, sampling_params=sampling))
    message = first.chunk if stream else first.complete
    assert [entry.HasField("value") for entry in message.input_logprobs.token_logprobs] == [False, True, True]
    assert [entry.value for entry in message.input_logprobs.token_logprobs][1:] == [-0.5, -0.5]
    assert message.input_logprobs.token_ids == [1, 2, 3]
    tops = [(list(top.token_ids), list(top.values)) for top in message.input_logprobs.top_logprobs]
    assert tops == [([], []), ([9, 2], [-0.25, -0.5]), ([9, 2], [-0.25, -0.5])]
    told = [message, *(response.chunk for response in rest if response.HasField("chunk"))]
    assert [token for part in told for token in part.output_logprobs.token_ids] == [5, 5]
    assert [logprob for part in told for logprob in part.output_logprobs.token_logprobs] == [-1.0, -1.0]
    assert not any(part.HasField("input_logprobs") for part in told[1:])
    assert (len(told), len(rest)) == ((2, 2) if stream else (1, 0))
    assert not any(response.complete.HasField("output_logprobs") for response in rest)


@pytest.mark.parametrize("stream", [True, False])
async def test_errors_are_codes(served: Server, stream: bool) -> None:
    served.router.core.script = answers([5], ending=Unavailable("none there", retry_after_ms=1_500))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await generated(served, request(stream=stream))
    assert refusal(raised.value) == (grpc.StatusCode.UNAVAILABLE, "none there")
    assert dict(raised.value.trailing_metadata() or ())["retry-after-ms"] == "1500"


async def test_leaving_cancels(served: Server) -> None:
    call = stub_of(served).Generate(request(stream=True))
    await served.router.core.until(lambda: served.router.core.submits)
    call.cancel()
    await served.router.core.until(lambda: not served.router.edge.in_flight)
    assert served.router.core.cancels == [Cancel(1)]


# -- requests ----------------------------------------------------------------------------------------------------------
def test_zero_is_unset_where_zero_could_not_be_meant() -> None:
    assert (
        fields_of()
        .keys()
        .isdisjoint(("temperature", "top_p", "repetition_penalty", "n", "seed", "logprobs", "prompt_logprobs"))
    )
    fields = fields_of(temperature=0, seed=0, logprobs=0, max_tokens=0, top_p=0.5, repetition_penalty=1.5, n=2)
    assert (fields["temperature"], fields["seed"], fields["logprobs"], fields["max_tokens"]) == (0.0, 0, 0, 0)
    assert (fields["top_p"], fields["repetition_penalty"], fields["n"]) == (0.5, 1.5, 2)


async def test_defaults_are_vllms(served: Server) -> None:
    served.router.core.script = answers([5])
    assert await generated(served, request())
    assert await generated(served, pb.GenerateRequest(text="\x07\x08", sampling_params=pb.SamplingParams(max_tokens=2)))
    ids, text = served.router.core.submits
    sampling = ids.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (1.0, 1.0, 0, 1.0)
    assert (sampling.min_p, sampling.frequency_penalty, sampling.presence_penalty, sampling.ignore_eos) == (
        0,
        0,
        0,
        False,
    )
    assert (text.token_ids, text.sampling.max_tokens) == ((7, 8), 2)


@pytest.mark.parametrize(("sampling", "max_tokens"), [({}, 61), ({"truncate_prompt_tokens": 2}, 62), ({"n": 1}, 61)])
async def test_without_max_tokens_the_answer_may_fill_the_context(
    served: Server, sampling: dict[str, int], max_tokens: int
) -> None:
    served.router.core.script = answers([5])
    assert await generated(served, request(sampling_params=pb.SamplingParams(**sampling)))
    assert served.router.core.submits[0].sampling.max_tokens == max_tokens


def test_unstreamed_scores_are_as_many_as_one_piece_can_hold() -> None:
    def longest(stream: bool, **sampling: int) -> int:
        message = request(stream=stream, sampling_params=pb.SamplingParams(**sampling))
        return int(request_fields(message, context_tokens=40_003)["max_tokens"])

    assert [longest(stream, logprobs=3) for stream in (True, False)] == [40_000, 32_768]
    assert (longest(False, logprobs=3, n=2), longest(False)) == (16_384, 40_000)
    assert longest(False, logprobs=-1) == 40_000  # which the validator refuses


async def test_every_field_means_what_it_means_over_http(served: Server) -> None:
    served.router.core.script = says((0, [5], STOP), (1, [5], STOP))
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 40,
        "min_p": 0.125,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "max_tokens": 9,
        "min_tokens": 1,
        "stop": ["END", "\n"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "n": 2,
        "seed": 3,
        "include_stop_str_in_output": True,
        "truncate_prompt_tokens": 2,
        "logprobs": 1,
        "prompt_logprobs": 0,
    }
    message = request(sampling_params=pb.SamplingParams(**fields, logit_bias={5: -1.5}, regex="a+"))
    as_over_http = fields | {
        "prompt": [1, 2, 3],
        "logit_bias": {"5": -1.5},
        "structured_outputs": {"regex": "a+"},
        "skip_special_tokens": False,
    }
    validate = served.router.validator.validate
    assert not request_fields(message, context_tokens=64)["stream"]
    assert await validate(request_fields(message, context_tokens=64)) == await validate(as_over_http)


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"json_schema": '{"type": "object"}'}, Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')),
        ({"json_object": True}, Constraint(ConstraintKind.JSON_OBJECT)),
        ({"choice": pb.ChoiceConstraint(choices=["a", "b"])}, Constraint(ConstraintKind.CHOICE, '["a","b"]')),
        ({"grammar": "start: /a/"}, Constraint(ConstraintKind.GRAMMAR, "start: /a/")),
        ({"regex": "a", "grammar_from_first_token": True}, Constraint(ConstraintKind.REGEX, "a")),
    ],
)
async def test_constraints(served: Server, fields: Any, constraint: Constraint) -> None:
    served.router.core.script = answers([5])
    assert await generated(served, request(sampling_params=pb.SamplingParams(**fields)))
    assert served.router.core.submits[0].sampling.constraint == constraint


@pytest.mark.parametrize(
    ("message", "word"),
    [
        (pb.GenerateRequest(), "prompt"),
        (request(tokenized=pb.TokenizedInput()), "prompt"),
        (request(tokenized=pb.TokenizedInput(input_ids=[1] * 65)), "prompt"),
        (request(tokenized=pb.TokenizedInput(input_ids=[1_000])), "prompt"),
        (request(mm_inputs=pb.MultimodalInputs()), "mm_inputs: not served"),
        (request(extra_mm_inputs=[pb.MultimodalInputs()]), "extra_mm_inputs: not served"),
        (request(media_refs=pb.MediaRefs()), "media_refs: not served"),
        (request(kv_transfer_params=pb.KvTransferParams()), "kv_transfer_params: not served"),
        (request(kv_transfer_params_json='{"do_remote_prefill": true}'), "kv_transfer_params_json: not served"),
        (request(data_parallel_rank=1), "data_parallel_rank"),
        (request(request_id="x" * 129), "request_id: at most 128 characters"),
        (request(sampling_params=pb.SamplingParams(structural_tag="{}")), "structured_outputs"),
        (request(sampling_params=pb.SamplingParams(logprobs=-1)), "logprobs: must be"),
        (request(sampling_params=pb.SamplingParams(seed=-1)), "seed: must be"),
        (request(sampling_params=pb.SamplingParams(top_p=2)), "top_p: must be"),
        (request(sampling_params=pb.SamplingParams(logit_bias={-1: 1})), "logit_bias: keys"),
        (request(sampling_params=pb.SamplingParams(stop=[""] * 17)), "stop: at most 16"),
        (request(sampling_params=pb.SamplingParams(max_tokens=62)), "max_tokens: prompt and max_tokens"),
        (request(sampling_params=pb.SamplingParams(temperature=float("nan"))), "temperature: must be"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(served: Server, message: pb.GenerateRequest, word: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await generated(served, message)
    code, text = refusal(raised.value)
    assert code is grpc.StatusCode.INVALID_ARGUMENT and word in text
    assert served.router.core.delivered == []


async def test_what_asks_for_nothing_is_accepted(served: Server) -> None:
    served.router.core.script = answers([5])
    for neutral in ({"kv_transfer_params_json": "{}"}, {"kv_transfer_params_json": ""}, {"data_parallel_rank": 0}):
        assert await generated(served, request(**neutral))


def test_of_lists_no_more_is_read_than_shows_that_they_are_too_long() -> None:
    many = 200_000
    sampling = pb.SamplingParams(
        stop=[""] * many, stop_token_ids=[1] * many, logit_bias=dict.fromkeys(range(many), 1.0)
    )
    fields = request_fields(
        request(tokenized=pb.TokenizedInput(input_ids=[1] * many), sampling_params=sampling), context_tokens=64
    )
    counts = {name: len(fields[name]) for name in ("prompt", "stop", "stop_token_ids", "logit_bias")}
    assert counts == {"prompt": 131_073, "stop": 17, "stop_token_ids": 65, "logit_bias": 1_025}


@pytest.mark.parametrize("method", ["Embed", "StartProfile", "StopProfile"])
async def test_what_we_do_not_do_says_so(served: Server, method: str) -> None:
    message = {
        "Embed": pb.EmbedRequest(),
        "StartProfile": common.StartProfileRequest(),
        "StopProfile": common.StopProfileRequest(),
    }[method]
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await getattr(stub_of(served), method)(message)
    code, text = refusal(raised.value)
    assert code is grpc.StatusCode.UNIMPLEMENTED and text.startswith(f"{method}: ")


async def test_kv_events_are_not_published(served: Server) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub_of(served).SubscribeKvEvents(common.SubscribeKvEventsRequest()).read()
    assert refusal(raised.value) == (grpc.StatusCode.UNIMPLEMENTED, "SubscribeKvEvents: KV events are not published")


# -- abort -------------------------------------------------------------------------------------------------------------
async def test_abort_by_the_clients_id_ends_all_of_that_name_and_nobody_elses(guarded: Server) -> None:
    core, stub = guarded.router.core, stub_of(guarded)
    calls = []
    for number, (label, metadata) in enumerate(
        (("a", ACME), ("a", ACME), ("", ACME), ("b", ACME), ("a", OTHER)), start=1
    ):
        calls.append(stub.Generate(request(request_id=label, stream=True), metadata=metadata))
        await core.until(lambda number=number: len(core.submits) == number)
    await stub.Abort(pb.AbortRequest(request_ids=["a", "", "nobody"]), metadata=ACME)
    for call in calls[:2]:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert refusal(raised.value)[0] is grpc.StatusCode.CANCELLED
    assert sorted(cancel.key for cancel in core.cancels) == [1, 2]
    for call in calls[2:]:
        call.cancel()
    await core.until(lambda: not guarded.router.edge.in_flight)


async def test_an_abort_names_no_more_requests_than_there_may_be(served: Server) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub_of(served).Abort(pb.AbortRequest(request_ids=["x"] * 1_025))
    assert refusal(raised.value) == (grpc.StatusCode.INVALID_ARGUMENT, "request_ids: at most 1024 ids")


async def test_an_id_is_forgotten_with_its_call(served: Server) -> None:
    request = await served.router.validator.validate({"prompt": [1]})
    first, second = served.router.edge.open(request), served.router.edge.open(request)
    live = LiveRequests()
    with live.named("a", first), live.named("a", second), live.named("b", first):
        assert len(live) == 2
    assert len(live) == 0


# -- keys --------------------------------------------------------------------------------------------------------------
GUARDED: Any = [
    ("Abort", pb.AbortRequest()),
    ("GetModelInfo", pb.GetModelInfoRequest()),
    ("GetServerInfo", pb.GetServerInfoRequest()),
    ("GetLoads", pb.GetLoadsRequest()),
    ("FlushCache", common.FlushCacheRequest()),
]


@pytest.mark.parametrize(("method", "message"), GUARDED)
async def test_without_a_key_nothing_is_told(guarded: Server, method: str, message: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await getattr(stub_of(guarded), method)(message)
    assert refusal(raised.value)[0] is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("method", "message"), [("Generate", request()), ("GetTokenizer", common.GetTokenizerRequest())]
)
async def test_without_a_key_nothing_is_streamed(guarded: Server, method: str, message: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await getattr(stub_of(guarded), method)(message).read()
    assert refusal(raised.value)[0] is grpc.StatusCode.UNAUTHENTICATED
    assert guarded.router.core.delivered == []


async def test_only_admins_empty_the_cache(guarded: Server) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub_of(guarded).FlushCache(common.FlushCacheRequest(), metadata=ACME)
    assert refusal(raised.value) == (grpc.StatusCode.PERMISSION_DENIED, "FlushCache: needs an admin's key")
    assert guarded.router.core.delivered == []
    assert (await stub_of(guarded).FlushCache(common.FlushCacheRequest(), metadata=OPS)).success
    assert guarded.router.core.delivered == [ResetCache()]


async def test_health_needs_no_key_and_follows_readiness(guarded: Server) -> None:
    assert (await stub_of(guarded).HealthCheck(pb.HealthCheckRequest())).healthy
    guarded.router.state.ready = False
    health = await stub_of(guarded).HealthCheck(pb.HealthCheckRequest())
    assert (health.healthy, bool(health.message)) == (False, True)


# -- facts -------------------------------------------------------------------------------------------------------------
async def test_model_info_has_names_and_no_paths() -> None:
    facts = ServerFacts(tokenizer=Path("/srv/models/tiny"))
    async with running(Router(), facts=facts) as server:
        info = await stub_of(server).GetModelInfo(pb.GetModelInfoRequest())
    assert (info.served_model_name, info.model_path, info.is_generation, info.supports_vision) == (
        "tiny",
        "tiny",
        True,
        False,
    )
    assert (info.max_context_length, info.max_req_input_len, info.vocab_size) == (64, 63, 1_000)
    assert info.eos_token_ids == [999]
    assert "/srv" not in str(info)


async def test_server_info() -> None:
    facts = ServerFacts(model_dtype="bfloat16", block_size=16)
    async with running(Router(), facts=facts) as server:
        server.router.now_us += 2_500_000
        info = await stub_of(server).GetServerInfo(pb.GetServerInfoRequest())
        server.router.state.ready = False
        paused = await stub_of(server).GetServerInfo(pb.GetServerInfoRequest())
    assert (info.uptime_seconds, info.server_type, info.data_parallel_size) == (2.5, "triptych", 1)
    assert (info.kv_cache_dtype, info.model_dtype, info.block_size) == ("bfloat16", "bfloat16", 16)
    assert (info.is_paused, paused.is_paused, info.max_num_seqs) == (False, True, 1_024)


async def test_the_cluster_is_one_rank_with_one_queue() -> None:
    facts = ServerFacts(version="1.2.3", block_size=16)
    async with running(Router(), facts=facts) as server:
        state, core = server.router.state, server.router.core
        busy = replace(WORKER, running=1, free_columns=3)
        state.workers = lambda: [busy, replace(busy, id="w2"), replace(busy, connected=False)]  # type: ignore[method-assign]
        state.counted = {("prefix_cache_hits", ()): 30.0, ("prefix_cache_queries", ()): 120.0}
        calls = []
        for number in (1, 2, 3):
            calls.append(stub_of(server).Generate(request()))
            await core.until(lambda number=number: len(core.submits) == number)
        loads = await stub_of(server).GetLoads(pb.GetLoadsRequest())
        for call in calls:
            call.cancel()
        await core.until(lambda: not server.router.edge.in_flight)
    (load,) = loads.loads
    assert (loads.timestamp, loads.version, loads.dp_rank_count) == ("1970-01-01T00:00:00+00:00", "1.2.3", 1)
    assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (2, 1, 3)
    assert (load.num_used_tokens, load.max_total_num_tokens) == (12 * 16, 18 * 16)
    assert (load.token_usage, load.cache_hit_rate) == (pytest.approx(12 / 18), 0.25)


# -- tokenizer ---------------------------------------------------------------------------------------------------------
async def test_the_tokenizers_files_come_as_one_archive_and_weights_do_not(tmp_path: Path) -> None:
    # What does not compress: the archive has to be more than one chunk.
    vocabulary = b"".join(hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(5_000))
    (tmp_path / "tokenizer.json").write_bytes(vocabulary)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    async with running(Router(), facts=ServerFacts(tokenizer=tmp_path)) as server:
        for _ in range(2):
            chunks = [chunk async for chunk in stub_of(server).GetTokenizer(common.GetTokenizerRequest())]
    assert len(chunks) > 2 and all(len(chunk.data) <= 65_536 for chunk in chunks)
    data = b"".join(chunk.data for chunk in chunks)
    digest = hashlib.sha256(data).hexdigest()
    assert [chunk.sha256 for chunk in chunks] == [""] * (len(chunks) - 1) + [digest]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["tokenizer.json", "chat_template.jinja"]
        assert archive.read("tokenizer.json") == vocabulary


@pytest.mark.parametrize("folder", [True, False])
async def test_a_model_without_tokenizer_files_has_none_to_give(tmp_path: Path, folder: bool) -> None:
    async with running(Router(), facts=ServerFacts(tokenizer=tmp_path if folder else None)) as server:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub_of(server).GetTokenizer(common.GetTokenizerRequest()).read()
    assert refusal(raised.value)[0] is grpc.StatusCode.FAILED_PRECONDITION


def test_every_method_of_the_protocol_is_answered_by_us() -> None:
    """A method that the package's next version adds would answer with its generated stub."""
    for method in pb.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name:
        assert method in vars(VllmEngineService), method


def test_a_refusal_is_an_error_of_ours() -> None:
    with pytest.raises(InvalidArgument) as raised:
        request_fields(request(media_refs=pb.MediaRefs()), context_tokens=64)
    assert raised.value.field == "media_refs"
