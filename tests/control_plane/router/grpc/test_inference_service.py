"""gRPC means the same as HTTP: over a real server on loopback, with the scripted core behind it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from control_plane.router import edge
from control_plane.router.grpc.calls import GRPC_CODE
from control_plane.router.grpc.inference_service import SERVICE_NAME, request_fields
from control_plane.router.grpc.server_facts import ServerFacts
from control_plane.router.requests import Cancel, WorkerView
from control_plane.router.validation.validator import ValidatedRequest
from control_plane.wire import inference_pb2 as pb
from control_plane.wire import inference_pb2_grpc as pb_grpc
from engine.base.errors import DataLoss, InvalidArgument, Status, TriptychError, Unavailable
from engine.types import Constraint, ConstraintKind, FinishReason
from tests.control_plane.router.edge_fakes import (
    WORKER,
    FakeCore,
    Router,
    answers,
    in_turns,
    says,
    score,
    template,
    turns,
)
from tests.control_plane.router.grpc_fakes import ACME, KEYS, OPS, OTHER, Server, refusal, running
from tests.control_plane.router.seeing import data_url, picture, saved, seeing

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def served() -> AsyncIterator[Server]:
    async with running(Router(edge_config=edge.Config(unread_tokens_max=64))) as server:
        yield server


@pytest.fixture
async def guarded() -> AsyncIterator[Server]:
    """A server that asks for keys."""
    async with running(Router(), keys=KEYS) as server:
        yield server


def stub_of(server: Server) -> Any:
    return pb_grpc.InferenceStub(server.channel)


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"tokens": pb.TokenIds(ids=[1, 2, 3]), **fields})


async def test_a_stream_carries_tokens_text_and_one_ending(served: Server) -> None:
    served.router.core.script = answers([5], [6], ending=FinishReason.LENGTH)
    responses = [response async for response in stub_of(served).Generate(request())]
    assert [token for response in responses for token in response.token_ids] == [5, 6]
    assert "".join(response.text for response in responses) == " 5 6"
    assert [response.finish_reason for response in responses[:-1]] == [""] * (len(responses) - 1)
    last = responses[-1]
    assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == ("length", 3, 2)
    assert (last.stats.prefill_worker, last.stats.codec, last.stats.kv_bytes_wire) == ("p1", "raw", 1_000)
    assert {response.id for response in responses} == {"id1"}


async def test_set_fields_reach_the_core_and_absent_ones_are_defaults(served: Server) -> None:
    served.router.core.script = answers([5])
    sampling = pb.GenerateSampling(temperature=0, seed=0, max_tokens=3, stop_token_ids=[4], ignore_eos=True)
    for message in (request(sampling=sampling, deadline_ms=50), pb.GenerateRequest(text="\x07")):
        assert [response async for response in stub_of(served).Generate(message)]
    asked, default = served.router.core.submits
    assert (asked.sampling.temperature, asked.sampling.seed, asked.sampling.max_tokens) == (0.0, 0, 3)
    assert (asked.sampling.stop_token_ids, asked.sampling.ignore_eos, asked.deadline_ms) == ((4,), True, 50)
    assert default.token_ids == (7,)
    assert (default.sampling.temperature, default.sampling.seed, default.sampling.max_tokens) == (1.0, 77, 16)


async def test_every_field_means_what_it_means_over_http(served: Server) -> None:
    served.router.core.script = says((0, [5], STOP), (1, [5], STOP))
    sampling = pb.GenerateSampling(
        top_k=40,
        min_p=0.25,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        repetition_penalty=1.5,
        min_tokens=1,
        stop=["END", "\n"],
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        n=2,
        logprobs=0,
        prompt_logprobs=3,
        logit_bias={5: -1.5},
        truncate_prompt_tokens=2,
        allowed_token_ids=[5, 6],
        bad_words=["a"],
        regex="a+",
    )
    fields = {
        "prompt": [1, 2, 3],
        "top_k": 40,
        "min_p": 0.25,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "min_tokens": 1,
        "stop": ["END", "\n"],
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "n": 2,
        "logprobs": 0,
        "stream": False,  # as the prompt's scores have it
        "prompt_logprobs": 3,
        "logit_bias": {"5": -1.5},
        "truncate_prompt_tokens": 2,
        "allowed_token_ids": [5, 6],
        "bad_words": ["a"],
        "structured_outputs": {"regex": "a+"},
        "cache_salt": "s",
        "priority": -2,
        "add_special_tokens": False,
        "return_token_ids": True,
        "triptych": {"codec": "int8", "kl_budget": 0.0, "slo": {"ttft_ms": 250, "tpot_ms": 30}},
    }
    message = request(
        sampling=sampling,
        priority=-2,
        cache_salt="s",
        add_special_tokens=False,
        codec="int8",
        kl_budget=0.0,
        ttft_slo_ms=250,
        tpot_slo_ms=30,
        return_token_ids=True,
    )
    validate = served.router.validator.validate
    assert await validate(request_fields(message)) == await validate(fields)
    assert [response async for response in stub_of(served).Generate(message)]
    (submit,) = served.router.core.submits
    assert (submit.token_ids, submit.choices, submit.priority, submit.cache_salt) == ((2, 3), 2, -2, "s")
    assert (submit.codec, submit.kl_budget) == ("int8", 0.0)


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"json_schema": '{"type": "object"}'}, Constraint(ConstraintKind.JSON_SCHEMA, '{"type":"object"}')),
        ({"json_object": True}, Constraint(ConstraintKind.JSON_OBJECT)),
        ({"json_object": False}, None),
        ({"regex": "a"}, Constraint(ConstraintKind.REGEX, "a")),
        ({"choice": pb.Strings(values=["a", "b"])}, Constraint(ConstraintKind.CHOICE, '["a","b"]')),
        ({"grammar": "start: /a/"}, Constraint(ConstraintKind.GRAMMAR, "start: /a/")),
    ],
)
async def test_constraints_are_one_of_five(served: Server, fields: Any, constraint: Constraint | None) -> None:
    served.router.core.script = answers([5])
    message = request(sampling=pb.GenerateSampling(**fields))
    assert [response async for response in stub_of(served).Generate(message)]
    assert served.router.core.submits[0].sampling.constraint == constraint


async def test_choices_are_told_apart_and_the_last_response_has_the_figures(served: Server) -> None:
    served.router.core.script = says((1, [7], None), (0, [5], None), (1, [8], LENGTH), (0, [6], LENGTH))
    responses = [response async for response in stub_of(served).Generate(request(sampling=pb.GenerateSampling(n=2)))]
    for choice, text in ((0, " 5 6"), (1, " 7 8")):
        own = [response for response in responses if response.index == choice]
        assert "".join(response.text for response in own) == text
        assert own[-1].completion_tokens == 2
        assert [response.finish_reason for response in own] == [""] * (len(own) - 1) + ["length"]
    assert [response.HasField("stats") for response in responses] == [False] * (len(responses) - 1) + [True]
    assert [response.cached_tokens for response in responses] == [0] * (len(responses) - 1) + [2]
    assert (responses[-1].stats.cached_tokens, responses[-1].stats.skipped_tokens) == (2, 1)


async def test_a_stop_is_named(served: Server) -> None:
    served.router.core.script = says((0, [5, 42], STOP), (1, [6, 7, 8], None))
    sampling = pb.GenerateSampling(n=2, stop=[" 7"], stop_token_ids=[42])
    last = {
        response.index: response
        async for response in stub_of(served).Generate(request(sampling=sampling))
        if response.finish_reason
    }
    assert (last[0].matched_token_id, last[0].WhichOneof("matched_stop")) == (42, "matched_token_id")
    assert (last[1].matched_stop_str, last[1].text, last[1].completion_tokens) == (" 7", " 6", 2)
    served.router.core.script = says((0, [999], STOP))
    (end_of_sequence,) = [response async for response in stub_of(served).Generate(request())]
    assert end_of_sequence.WhichOneof("matched_stop") is None


async def test_logprobs_of_prompt_and_output(served: Server) -> None:
    scored, sampled = score(-0.5, (9, -0.25), (2, -0.5)), score(-1.0, (5, -1.0))

    def script(core: FakeCore, key: int) -> None:
        tokens = partial(core.tokens, key, 5, finish=LENGTH, logprobs=[sampled])
        in_turns([partial(core.scored, key, 1, scored, scored), tokens])

    served.router.core.script = script
    sampling = pb.GenerateSampling(logprobs=1, prompt_logprobs=2)
    first, last = [response async for response in stub_of(served).Generate(request(sampling=sampling))]
    of_prompt, of_output = first.input_logprobs, last.output_logprobs
    assert (of_prompt.start, of_prompt.token_ids, of_prompt.token_logprobs) == (1, [2, 3], [-0.5, -0.5])
    assert [(top.token_ids, top.values) for top in of_prompt.top_logprobs] == [([9, 2], [-0.25, -0.5])] * 2
    assert first.token_ids == [] and not last.HasField("input_logprobs")
    assert (of_output.token_ids, of_output.token_logprobs) == ([5], [-1.0])
    assert [(top.token_ids, top.values) for top in of_output.top_logprobs] == [([5], [-1.0])]


@pytest.mark.parametrize(
    ("message", "code", "word"),
    [
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (pb.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (request(tokens=pb.TokenIds(ids=[1_000])), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (request(tokens=pb.TokenIds(ids=[1] * 65)), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (request(model="other"), grpc.StatusCode.NOT_FOUND, "model"),
        (request(deadline_ms=700_000), grpc.StatusCode.INVALID_ARGUMENT, "deadline_ms"),
        (request(sampling=pb.GenerateSampling(temperature=float("nan"))), grpc.StatusCode.INVALID_ARGUMENT, "temp"),
        (request(sampling=pb.GenerateSampling(temperature=float("inf"))), grpc.StatusCode.INVALID_ARGUMENT, "temp"),
        (request(sampling=pb.GenerateSampling(top_p=0)), grpc.StatusCode.INVALID_ARGUMENT, "top_p"),
        (request(sampling=pb.GenerateSampling(seed=1 << 63)), grpc.StatusCode.INVALID_ARGUMENT, "seed"),
        (request(sampling=pb.GenerateSampling(max_tokens=1 << 31)), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (request(sampling=pb.GenerateSampling(stop_token_ids=[1] * 65)), grpc.StatusCode.INVALID_ARGUMENT, "stop"),
        (request(sampling=pb.GenerateSampling(n=17)), grpc.StatusCode.INVALID_ARGUMENT, "n: must be"),
        (request(sampling=pb.GenerateSampling(logprobs=21)), grpc.StatusCode.INVALID_ARGUMENT, "logprobs: must be"),
        (request(sampling=pb.GenerateSampling(stop=[""])), grpc.StatusCode.INVALID_ARGUMENT, "stop: each"),
        (request(sampling=pb.GenerateSampling(logit_bias={1_000: 1})), grpc.StatusCode.INVALID_ARGUMENT, "logit_bias"),
        (request(sampling=pb.GenerateSampling(json_schema="{")), grpc.StatusCode.INVALID_ARGUMENT, "outputs.json: "),
        (request(sampling=pb.GenerateSampling(regex="hostile")), grpc.StatusCode.INVALID_ARGUMENT, "outputs.regex: "),
        (request(cache_salt=""), grpc.StatusCode.INVALID_ARGUMENT, "cache_salt"),
    ],
)
async def test_bad_values_are_refused_by_name(
    served: Server, message: pb.GenerateRequest, code: grpc.StatusCode, word: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub_of(served).Generate(message).read()
    assert raised.value.code() is code and word in str(raised.value.details())
    assert served.router.core.delivered == []


@pytest.mark.parametrize("tokens", [(), ([5],)])
@pytest.mark.parametrize("error", [Unavailable("none there", retry_after_ms=1_500), DataLoss("corrupt")])
async def test_errors_of_the_core_are_codes(served: Server, error: TriptychError, tokens: Any) -> None:
    served.router.core.script = answers(*tokens, ending=error)
    call = stub_of(served).Generate(request())
    received: list[int] = []
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for response in call:
            received += response.token_ids
    assert raised.value.code() is GRPC_CODE[error.status] and raised.value.details() == error.message
    assert received == [token for batch in tokens for token in batch]
    retry = dict(raised.value.trailing_metadata() or ()).get("retry-after-ms")
    assert retry == ("1500" if error.retry_after_ms else None)


def test_every_status_has_a_code() -> None:
    assert set(GRPC_CODE) == set(Status)


async def test_a_cancelled_call_cancels_exactly_once(served: Server) -> None:
    call = stub_of(served).Generate(request())
    await served.router.core.until(lambda: served.router.core.submits)
    served.router.core.tokens(1, 5)
    assert (await call.read()).token_ids == [5]
    call.cancel()
    await served.router.core.until(lambda: served.router.core.cancels and not served.router.edge.in_flight)
    assert served.router.core.cancels == [Cancel(1)]


async def test_abort_ends_the_call_that_its_id_names(served: Server) -> None:
    call = stub_of(served).Generate(request())
    await served.router.core.until(lambda: served.router.core.submits)
    served.router.core.tokens(1, 5)
    first = await call.read()
    for id in ("nobody", first.id, first.id):
        await stub_of(served).Abort(pb.AbortRequest(id=id))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert raised.value.code() is grpc.StatusCode.CANCELLED
    assert served.router.core.cancels == [Cancel(1)]


# -- keys --------------------------------------------------------------------------------------------------------------
CALLS: Any = [
    ("Generate", request(tokens=pb.TokenIds(ids=[1_000]))),  # no word about what else is wrong with it
    ("Abort", pb.AbortRequest(id="id1")),
    ("GetModelInfo", pb.GetModelInfoRequest()),
    ("GetServerInfo", pb.GetServerInfoRequest()),
    ("GetLoads", pb.GetLoadsRequest()),
]


async def call(stub: Any, method: str, message: Any, metadata: Any = ()) -> Any:
    called = getattr(stub, method)(message, metadata=metadata)
    return [response async for response in called] if method == "Generate" else await called


@pytest.mark.parametrize("authorization", [None, "sk-acme", "Bearer", "Bearer sk-nobody", "Basic sk-acme"])
@pytest.mark.parametrize(("method", "message"), CALLS)
async def test_without_a_key_nothing_is_told(
    guarded: Server, method: str, message: Any, authorization: str | None
) -> None:
    metadata = () if authorization is None else (("authorization", authorization),)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call(stub_of(guarded), method, message, metadata)
    code, text = refusal(raised.value)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert text == "authorization: needs 'Bearer KEY' with a key of this server"
    assert guarded.router.core.delivered == []


@pytest.mark.parametrize(("method", "message"), CALLS[1:])
async def test_any_key_opens_what_is_not_about_others(guarded: Server, method: str, message: Any) -> None:
    await call(stub_of(guarded), method, message, ACME)


async def test_a_request_is_its_keys_tenants(guarded: Server) -> None:
    guarded.router.core.script = answers([5])
    assert await call(stub_of(guarded), "Generate", request(cache_salt="s"), ACME)
    (submit,) = guarded.router.core.submits
    assert (submit.tenant, submit.cache_scope) == ("acme", "acme/s")


async def test_abort_reaches_its_own_tenant_only_unless_it_is_an_admins(guarded: Server) -> None:
    stub, core = stub_of(guarded), guarded.router.core
    calls = [stub.Generate(request(), metadata=ACME)]
    await core.until(lambda: len(core.submits) == 1)
    calls.append(stub.Generate(request(), metadata=ACME))
    await core.until(lambda: len(core.submits) == 2)
    cancelled = []
    for id, metadata in (("id1", OTHER), ("id1", ACME), ("id2", OTHER), ("id2", OPS)):
        await stub.Abort(pb.AbortRequest(id=id), metadata=metadata)
        cancelled.append(list(core.cancels))
    assert cancelled == [[], [Cancel(1)], [Cancel(1)], [Cancel(1), Cancel(2)]]
    for aborted in calls:
        with pytest.raises(grpc.aio.AioRpcError):
            await aborted.read()


# -- what comes beside the message -------------------------------------------------------------------------------------
async def validated(served: Server, message: pb.GenerateRequest, **options: Any) -> ValidatedRequest:
    """What the request became."""
    seen: list[ValidatedRequest] = []
    opened = served.router.edge.open

    def open(request: ValidatedRequest) -> Any:
        seen.append(request)
        return opened(request)

    served.router.edge.open = open  # type: ignore[method-assign]
    served.router.core.script = answers([5])
    assert [response async for response in stub_of(served).Generate(message, **options)]
    return seen[0]


async def test_metadata_is_read_as_headers_are(served: Server) -> None:
    metadata = (("x-request-id", "mine"), ("x-slo-ttft-ms", "250"), ("x-slo-tpot-ms", "30"))
    found = await validated(served, request(), metadata=metadata)
    assert (found.label, found.ttft_slo_ms, found.tpot_slo_ms) == ("mine", 250, 30)


async def test_the_messages_own_fields_come_before_metadata(served: Server) -> None:
    metadata = (("x-request-id", "mine"), ("x-slo-ttft-ms", "250"), ("x-slo-tpot-ms", "30"))
    found = await validated(served, request(request_id="other", ttft_slo_ms=99), metadata=metadata)
    assert (found.label, found.ttft_slo_ms, found.tpot_slo_ms) == ("other", 99, 30)


async def test_a_bad_header_is_refused_by_name(served: Server) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub_of(served).Generate(request(), metadata=(("x-slo-ttft-ms", "soon"),)).read()
    assert refusal(raised.value)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert "x-slo-ttft-ms: must be" in refusal(raised.value)[1]
    assert dict(raised.value.trailing_metadata() or ())["field"] == "x-slo-ttft-ms"


async def test_the_calls_deadline_is_the_requests_if_that_has_none(served: Server) -> None:
    assert (await validated(served, request())).deadline_ms == 120_000
    assert (await validated(served, request(deadline_ms=70), timeout=50)).deadline_ms == 70
    assert 40_000 < (await validated(served, request(), timeout=50)).deadline_ms < 60_000
    assert (await validated(served, request(), timeout=10_000)).deadline_ms == 600_000


async def test_a_call_that_runs_out_of_time_ends_its_request(served: Server) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub_of(served).Generate(request(), timeout=0.05).read()
    assert refusal(raised.value)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    await served.router.core.until(lambda: not served.router.edge.in_flight)


# -- prompts -----------------------------------------------------------------------------------------------------------
def test_a_chat_is_the_fields_that_http_has() -> None:
    said = [pb.ChatMessage(role="system", content="Be brief."), pb.ChatMessage(role="user", content="Hi")]
    chat = pb.Chat(
        messages=said,
        add_generation_prompt=False,
        continue_final_message=True,
        chat_template_kwargs_json='{"enable_thinking": false}',
    )
    fields = request_fields(pb.GenerateRequest(chat=chat, sampling=pb.GenerateSampling(logprobs=2)))
    assert fields["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert (fields["add_generation_prompt"], fields["continue_final_message"]) == (False, True)
    assert fields["chat_template_kwargs"] == {"enable_thinking": False}
    assert (fields["logprobs"], fields["top_logprobs"], "prompt" in fields) == (True, 2, False)


async def test_a_chat_is_put_into_words_by_the_models_template() -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="\x07\x08")])
    async with running(Router(chat=template())) as server:
        found = await validated(server, pb.GenerateRequest(chat=chat, sampling=pb.GenerateSampling(logprobs=0)))
        assert server.router.sample("triptych_unknown_fields_total") == 0
    assert (found.token_ids, found.chat, found.sampling.logprobs, found.sampling.max_tokens) == ((7, 8), True, 0, 62)


@pytest.mark.procs
async def test_an_image_is_a_file_or_a_url() -> None:
    file = saved(picture())
    parts = [
        pb.ContentPart(text="what"),
        pb.ContentPart(image=pb.Image(data=file)),
        pb.ContentPart(image=pb.Image(url=data_url(file))),
    ]
    with seeing() as router:
        async with running(router) as server:
            chat = pb.Chat(messages=[pb.ChatMessage(role="user", parts=parts)])
            found = await validated(server, pb.GenerateRequest(chat=chat))
            assert (len(found.images), found.image_tokens) == (2, 4)
            submitted = router.core.submits[0].images
            assert [one.picture.pixels for one in submitted] == [picture().tobytes()] * 2
            info = await stub_of(server).GetModelInfo(pb.GetModelInfoRequest())
            assert info.max_images == router.edge.card.images_max


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (pb.ChatMessage(role="user", parts=[pb.ContentPart()]), "messages[0].content[0]: this type of part is not"),
        (
            pb.ChatMessage(role="user", parts=[pb.ContentPart(image=pb.Image())]),
            "messages[0].content[0].image_url: must be a URL, or",
        ),
        (pb.ChatMessage(role="user", content="a", parts=[pb.ContentPart(text="a")]), "content: and parts cannot both"),
        (pb.ChatMessage(role="user", parts=[pb.ContentPart(text="a")] * 200), "messages[0].content: at most 128 parts"),
    ],
)
async def test_parts_of_a_message_are_checked_as_over_http(message: pb.ChatMessage, told: str) -> None:
    with seeing() as router:
        with pytest.raises(InvalidArgument) as raised:
            await router.validator.validate(request_fields(pb.GenerateRequest(chat=pb.Chat(messages=[message]))))
        assert raised.value.message.startswith(told)


async def test_a_model_without_a_template_takes_no_chat(served: Server) -> None:
    message = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="a")]))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub_of(served).Generate(message).read()
    assert refusal(raised.value)[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert served.router.core.delivered == []


def test_an_absent_part_of_a_chat_is_not_sent_on() -> None:
    fields = request_fields(pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Hi")])))
    assert fields.keys().isdisjoint(
        ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "logprobs", "top_logprobs")
    )


@pytest.mark.parametrize("text", ["{", "[" * 10_000, " " * 70_000])
def test_template_arguments_are_bounded_json(text: str) -> None:
    with pytest.raises(InvalidArgument, match="chat_template_kwargs_json: "):
        request_fields(pb.GenerateRequest(chat=pb.Chat(chat_template_kwargs_json=text)))


def test_of_lists_no_more_is_read_than_shows_that_they_are_too_long() -> None:
    many = 200_000
    sampling = pb.GenerateSampling(
        stop=[""] * many,
        stop_token_ids=[1] * many,
        allowed_token_ids=[1] * many,
        bad_words=[""] * many,
        logit_bias=dict.fromkeys(range(many), 1.0),
        choice=pb.Strings(values=[""] * many),
    )
    fields = request_fields(pb.GenerateRequest(tokens=pb.TokenIds(ids=[1] * many), sampling=sampling))
    counts = {name: len(fields[name]) for name in ("prompt", "stop", "stop_token_ids", "logit_bias")}
    assert counts == {"prompt": 131_073, "stop": 17, "stop_token_ids": 65, "logit_bias": 1_025}
    assert (len(fields["allowed_token_ids"]), len(fields["bad_words"])) == (1_025, 129)
    assert len(fields["structured_outputs"]["choice"]) == 65_537
    chat = pb.Chat(messages=[pb.ChatMessage()] * 2_000)
    assert len(request_fields(pb.GenerateRequest(chat=chat))["messages"]) == 1_025


async def test_the_prompts_ids_come_once_and_first_if_asked_for(served: Server) -> None:
    served.router.core.script = says((0, [5], None), (0, [6], STOP))
    responses = await call(stub_of(served), "Generate", pb.GenerateRequest(text="\x07\x08", return_token_ids=True))
    assert [list(response.prompt_token_ids) for response in responses] == [[7, 8], *[[]] * (len(responses) - 1)]
    assert len(responses) > 1


# -- facts -------------------------------------------------------------------------------------------------------------
async def test_model_info(served: Server) -> None:
    info = await stub_of(served).GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.max_model_len, info.vocab_size) == ("tiny", 64, 1_000)
    assert (info.max_prompt_tokens, info.eos_token_ids, info.max_choices, info.max_logprobs) == (63, [999], 16, 20)


async def test_server_info() -> None:
    facts = ServerFacts(version="1.2.3", model_dtype="bfloat16", block_size=16, codecs=("raw", "auto"), codec="auto")
    async with running(Router(), facts=facts) as server:
        server.router.now_us += 7_500_000
        info = await stub_of(server).GetServerInfo(pb.GetServerInfoRequest())
        model = await stub_of(server).GetModelInfo(pb.GetModelInfoRequest())
    assert (info.version, info.wire_version, info.uptime_seconds, info.model) == ("1.2.3", 1, 7.5, "tiny")
    assert (info.block_size, info.codecs, info.codec, info.ready) == (16, ["raw", "auto"], "auto", True)
    assert (info.active_requests, info.max_requests, model.model_dtype) == (0, 1_024, "bfloat16")


async def test_loads_are_the_workers_and_their_sums(served: Server) -> None:
    idle = replace(WORKER, id="w2", name="decode-0", roles=("decode",), running=1, free_columns=9, cached_columns=4)
    gone = replace(WORKER, id="w3", connected=False)
    served.router.state.workers = lambda: [WORKER, idle, gone]  # type: ignore[method-assign]
    waiting = stub_of(served).Generate(request())
    await served.router.core.until(lambda: served.router.core.submits)
    loads = await stub_of(served).GetLoads(pb.GetLoadsRequest())
    assert [(load.id, load.name, load.roles, load.state) for load in loads.workers] == [
        ("w1", "prefill-0", ["prefill"], "SERVING"),
        ("w2", "decode-0", ["decode"], "SERVING"),
        ("w3", "prefill-0", ["prefill"], "SERVING"),
    ]
    first, second, third = loads.workers
    assert (first.num_running_reqs, first.num_waiting_reqs, first.free_columns, first.total_columns) == (2, 1, 7, 9)
    assert (second.cached_columns, third.connected) == (4, False)
    assert (loads.active_requests, loads.num_running_reqs, loads.num_waiting_reqs) == (1, 3, 2)
    assert loads.token_usage == pytest.approx(2 / 18)
    waiting.cancel()


# -- health and reflection ---------------------------------------------------------------------------------------------
def health_of(server: Server) -> Any:
    return health_pb2_grpc.HealthStub(server.channel)


async def status(server: Server, name: str) -> int:
    return int((await health_of(server).Check(health_pb2.HealthCheckRequest(service=name))).status)


async def test_health_follows_readiness(served: Server) -> None:
    names = ("", SERVICE_NAME, "vllm.grpc.engine.VllmEngine")
    assert [await status(served, name) for name in names] == [SERVING] * 3
    watch = health_of(served).Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert (await watch.read()).status == SERVING
    served.router.state.ready = False
    assert [await status(served, name) for name in names] == [NOT_SERVING] * 3
    served.health.refresh()
    assert (await watch.read()).status == NOT_SERVING
    watch.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await status(served, "other")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("workers", "held"),
    [
        ([], []),
        ([WORKER], ["prefill"]),
        ([replace(WORKER, roles=("prefill", "decode"))], ["prefill", "decode"]),
        ([replace(WORKER, state="DRAINING")], []),
        ([replace(WORKER, connected=False)], []),
    ],
)
async def test_a_roles_health_is_whether_a_serving_worker_holds_it(
    served: Server, workers: list[WorkerView], held: list[str]
) -> None:
    served.router.state.workers = lambda: workers  # type: ignore[method-assign]
    for role in ("encode", "prefill", "decode"):
        assert await status(served, role) == (SERVING if role in held else NOT_SERVING)


async def test_a_watcher_hears_of_its_own_names_changes_only(served: Server) -> None:
    watch = health_of(served).Watch(health_pb2.HealthCheckRequest(service="decode"))
    assert (await watch.read()).status == NOT_SERVING
    served.router.state.ready = False
    served.health.refresh()
    await turns()
    served.router.state.workers = lambda: [replace(WORKER, roles=("decode",))]  # type: ignore[method-assign]
    served.health.refresh()
    assert (await watch.read()).status == SERVING
    watch.cancel()
    unknown = health_of(served).Watch(health_pb2.HealthCheckRequest(service="router"))
    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_health_needs_refreshing_only_while_somebody_watches(served: Server) -> None:
    watched = asyncio.create_task(served.health.watched())
    await turns()
    assert not watched.done()
    watches = [health_of(served).Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    for watch in watches:
        assert (await watch.read()).status == SERVING
    await watched
    for watch in watches:
        watch.cancel()
    await served.unwatched()


async def test_health_and_reflection_need_no_key(guarded: Server) -> None:
    assert await status(guarded, "") == SERVING
    assert await listed_services(guarded)


async def listed_services(server: Server) -> set[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    return {service.name for service in (await call.read()).list_services_response.service}


async def test_reflection_lists_all_services(served: Server) -> None:
    assert await listed_services(served) == {
        "triptych.v1.Inference",
        "vllm.grpc.engine.VllmEngine",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
