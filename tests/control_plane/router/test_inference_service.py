"""gRPC means the same as HTTP: over a real server on loopback, with the scripted core behind it."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from control_plane.router import edge
from control_plane.router.inference_service import (
    GRPC_CODE,
    SERVICE_NAME,
    InferenceService,
    ReadinessHealth,
    add_services,
    request_fields,
)
from control_plane.router.requests import Cancel
from control_plane.wire import inference_pb2 as pb
from control_plane.wire import inference_pb2_grpc as pb_grpc
from engine.base.errors import DataLoss, Status, TriptychError, Unavailable
from engine.types import Constraint, ConstraintKind, FinishReason
from tests.control_plane.router.edge_fakes import FakeCore, Router, answers, in_turns, says, score, turns

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Server:
    def __init__(self, router: Router) -> None:
        self.router = router
        self.health = ReadinessHealth(router.state)
        self.server = grpc.aio.server()
        add_services(self.server, InferenceService(router.edge, router.validator), self.health)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.stub: Any = pb_grpc.InferenceStub(self.channel)

    async def unwatched(self) -> None:
        """Returns once nobody watches the health any more, which the server learns from the network."""
        while True:
            waiting = asyncio.create_task(self.health.watched())
            await turns(1)
            if not waiting.done():
                waiting.cancel()
                return


@pytest.fixture
async def served() -> AsyncIterator[Server]:
    server = Server(Router(edge_config=edge.Config(unread_tokens_max=64)))
    await server.server.start()
    yield server
    await server.channel.close()
    await server.server.stop(grace=None)


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"tokens": pb.TokenIds(ids=[1, 2, 3]), **fields})


async def test_a_stream_carries_tokens_text_and_one_ending(served: Server) -> None:
    served.router.core.script = answers([5], [6], ending=FinishReason.LENGTH)
    responses = [response async for response in served.stub.Generate(request())]
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
        assert [response async for response in served.stub.Generate(message)]
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
        "prompt_logprobs": 3,
        "logit_bias": {"5": -1.5},
        "truncate_prompt_tokens": 2,
        "allowed_token_ids": [5, 6],
        "bad_words": ["a"],
        "structured_outputs": {"regex": "a+"},
        "cache_salt": "s",
        "priority": -2,
        "add_special_tokens": False,
        "triptych": {"codec": "int8", "kl_budget": 0.0},
    }
    message = request(
        sampling=sampling, priority=-2, cache_salt="s", add_special_tokens=False, codec="int8", kl_budget=0.0
    )
    validate = served.router.validator.validate
    assert await validate(request_fields(message)) == await validate(fields)
    assert [response async for response in served.stub.Generate(message)]
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
    assert [response async for response in served.stub.Generate(message)]
    assert served.router.core.submits[0].sampling.constraint == constraint


async def test_choices_are_told_apart_and_the_last_response_has_the_figures(served: Server) -> None:
    served.router.core.script = says((1, [7], None), (0, [5], None), (1, [8], LENGTH), (0, [6], LENGTH))
    responses = [response async for response in served.stub.Generate(request(sampling=pb.GenerateSampling(n=2)))]
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
        async for response in served.stub.Generate(request(sampling=sampling))
        if response.finish_reason
    }
    assert (last[0].matched_token_id, last[0].WhichOneof("matched_stop")) == (42, "matched_token_id")
    assert (last[1].matched_stop_str, last[1].text, last[1].completion_tokens) == (" 7", " 6", 2)
    served.router.core.script = says((0, [999], STOP))
    (end_of_sequence,) = [response async for response in served.stub.Generate(request())]
    assert end_of_sequence.WhichOneof("matched_stop") is None


async def test_logprobs_of_prompt_and_output(served: Server) -> None:
    scored, sampled = score(-0.5, (9, -0.25), (2, -0.5)), score(-1.0, (5, -1.0))

    def script(core: FakeCore, key: int) -> None:
        tokens = partial(core.tokens, key, 5, finish=LENGTH, logprobs=[sampled])
        in_turns([partial(core.scored, key, 1, scored, scored), tokens])

    served.router.core.script = script
    sampling = pb.GenerateSampling(logprobs=1, prompt_logprobs=2)
    first, last = [response async for response in served.stub.Generate(request(sampling=sampling))]
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
        await served.stub.Generate(message).read()
    assert raised.value.code() is code and word in str(raised.value.details())
    assert served.router.core.delivered == []


@pytest.mark.parametrize("tokens", [(), ([5],)])
@pytest.mark.parametrize("error", [Unavailable("none there", retry_after_ms=1_500), DataLoss("corrupt")])
async def test_errors_of_the_core_are_codes(served: Server, error: TriptychError, tokens: Any) -> None:
    served.router.core.script = answers(*tokens, ending=error)
    call = served.stub.Generate(request())
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
    call = served.stub.Generate(request())
    await served.router.core.until(lambda: served.router.core.submits)
    served.router.core.tokens(1, 5)
    assert (await call.read()).token_ids == [5]
    call.cancel()
    await served.router.core.until(lambda: served.router.core.cancels and not served.router.edge.in_flight)
    assert served.router.core.cancels == [Cancel(1)]


async def test_abort_ends_the_call_that_its_id_names(served: Server) -> None:
    call = served.stub.Generate(request())
    await served.router.core.until(lambda: served.router.core.submits)
    served.router.core.tokens(1, 5)
    first = await call.read()
    for id in ("nobody", first.id, first.id):
        await served.stub.Abort(pb.AbortRequest(id=id))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert raised.value.code() is grpc.StatusCode.CANCELLED
    assert served.router.core.cancels == [Cancel(1)]


async def test_model_info(served: Server) -> None:
    info = await served.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.model, info.max_model_len, info.vocab_size) == ("tiny", 64, 1_000)


async def test_health_follows_readiness(served: Server) -> None:
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    for name in ("", SERVICE_NAME):
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
    assert (await watch.read()).status == SERVING
    served.router.state.ready = False
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING
    served.health.refresh()
    assert (await watch.read()).status == NOT_SERVING
    watch.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Check(health_pb2.HealthCheckRequest(service="other"))
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_needs_refreshing_only_while_somebody_watches(served: Server) -> None:
    watched = asyncio.create_task(served.health.watched())
    await turns()
    assert not watched.done()
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    for watch in watches:
        assert (await watch.read()).status == SERVING
    await watched
    for watch in watches:
        watch.cancel()
    await served.unwatched()


async def test_reflection_lists_the_services(served: Server) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    listed = {service.name for service in (await call.read()).list_services_response.service}
    assert {"triptych.v1.Inference", "grpc.health.v1.Health"} <= listed
