"""The public and the admin port: dialect, streaming, departures, slow readers, errors."""

import asyncio
import logging
import threading
from typing import Any

import httpx
import msgspec
import pytest

from control_plane.router import edge
from control_plane.router.edge import Edge
from control_plane.router.http import app as http
from control_plane.router.requests import Cancel, ResetCache
from control_plane.router.text.vocabulary import OracleVocabulary
from control_plane.router.validation import validator as validation
from engine.base import limits
from engine.base.errors import (
    DataLoss,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    TriptychError,
    Unavailable,
)
from engine.types import FinishReason
from tests.control_plane.router.edge_fakes import STATS, TRANSFER_ID, Call, Router, answers, body, events, turns


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["text"] for chunk in chunks for choice in chunk.get("choices", ()))


# -- the dialect -------------------------------------------------------------------------------------------------------
async def test_a_whole_answer_is_a_text_completion() -> None:
    router = Router()
    router.core.script = answers([5], [6], ending=FinishReason.LENGTH)
    answer = await router.complete(model="tiny", max_tokens=2)
    assert answer.status_code == 200
    assert answer.json() == {
        "id": "cmpl-id1",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [{"index": 0, "text": " 5 6", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
        "triptych": {
            "prefill_worker": "p1",
            "decode_worker": "d1",
            "encode_workers": [],
            "codec": "raw",
            "level": 0,
            "kv_bytes_raw": 4_000,
            "kv_bytes_wire": 1_000,
            "attempts": 1,
            "cached_tokens": 2,
            "skipped_tokens": 1,
            "image_tokens": 0,
            "image_hits": 0,
            "cached_image_tokens": 0,
            "phase_ms": {"queue": 1.0, "prefill": 2.0},
            "ttft_ms": 0.0,
            "tpot_ms": 0.0,
            "slo_met": None,
        },
    }
    assert router.edge.in_flight == 0


async def test_streamed_text_is_the_whole_text() -> None:
    router = Router()
    router.core.script = answers([5], [6, 7], [8])
    whole = (await router.complete()).json()["choices"][0]["text"]
    streamed = await router.complete(stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert text_of(events(streamed.content)) == whole == " 5 6 7 8"


async def test_no_event_precedes_the_first_token_and_only_the_last_has_a_reason() -> None:
    router = Router()
    router.core.script = answers([5], [6], [7])
    chunks = events((await router.complete(stream=True)).content)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert chunks[0]["choices"][0]["text"] == " 5"
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert "triptych" in chunks[-1] and all("triptych" not in chunk for chunk in chunks[:-1])
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_usage_comes_last_when_asked_for() -> None:
    router = Router()
    router.core.script = answers([5], [6])
    chunks = events((await router.complete(stream=True, stream_options={"include_usage": True})).content)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert chunks[-1]["triptych"]["prefill_worker"] == "p1"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and "triptych" not in chunks[-2]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


async def test_continuous_usage_counts_in_every_chunk() -> None:
    router = Router()
    router.core.script = answers([5], [6])
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events((await router.complete(stream=True, stream_options=options)).content)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 2


async def test_a_stop_token_of_the_clients_is_the_reason_but_not_in_the_text() -> None:
    router = Router()
    router.core.script = answers([5], [42])
    choice = (await router.complete(stop_token_ids=[42])).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" 5", "stop", 42)


async def test_the_models_end_of_sequence_has_no_text_unless_it_is_ignored() -> None:
    router = Router()
    router.core.script = answers([5, 999])
    assert (await router.complete()).json()["choices"][0]["text"] == " 5"
    assert (await router.complete(ignore_eos=True)).json()["choices"][0]["text"] == " 5 999"


async def test_what_reaches_the_core_is_what_the_client_asked() -> None:
    router = Router()
    router.core.script = answers([5])
    await router.complete(
        prompt=[[9, 8]], temperature=0, top_p=0.5, seed=3, max_tokens=4, ignore_eos=True, triptych={"deadline_ms": 250}
    )
    await router.complete(prompt="\x07")
    asked, default = router.core.submits
    assert asked.token_ids == (9, 8) and asked.deadline_ms == 250
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.seed) == (0.0, 0.5, 3)
    assert (asked.sampling.max_tokens, asked.sampling.ignore_eos) == (4, True)
    assert default.token_ids == (7,) and default.deadline_ms == limits.REQUEST_DEADLINE_MS
    assert (default.sampling.max_tokens, default.sampling.seed, default.sampling.temperature) == (16, 77, 1.0)
    assert asked.key != default.key


@pytest.mark.parametrize(
    ("sent", "echoed"),
    [("abc-1", "abc-1"), ("a b\tc", "a_b_c"), ("x" * 500, "x" * 128), ("\x1b[31m", "__31m"), ("", "id1")],
)
async def test_request_ids_are_labels_made_harmless(sent: str, echoed: str) -> None:
    router = Router()
    router.core.script = answers([5])
    call = Call(router.app, body(), [(b"x-request-id", sent.encode())])
    await call.task
    assert dict(call.sent[0]["headers"])[b"x-request-id"].decode() == echoed


async def test_one_label_used_twice_names_two_requests() -> None:
    router = Router()
    router.core.script = answers([5])
    same = {"x-request-id": "twin"}
    first = await router.request("POST", "/v1/completions", json={"prompt": [1]}, headers=same)
    second = await router.request("POST", "/v1/completions", json={"prompt": [1]}, headers=same)
    assert first.headers["x-request-id"] == second.headers["x-request-id"] == "twin"
    assert first.json()["id"] != second.json()["id"]


# -- endings -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "retry"),
    [
        (ResourceExhausted("full", retry_after_ms=2_500), 429, "RateLimitError", "3"),
        (Unavailable("no decode worker"), 503, "ServiceUnavailableError", "1"),
        (DeadlineExceeded("too late"), 504, "GatewayTimeoutError", None),
        (DataLoss("corrupt"), 502, "BadGatewayError", None),
    ],
)
async def test_a_failure_before_the_first_token_is_a_plain_http_error(
    error: TriptychError, status: int, kind: str, retry: str | None, stream: bool
) -> None:
    router = Router()
    router.core.script = answers(ending=error)
    answer = await router.complete(stream=stream)
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry
    assert answer.json() == {"error": {"message": error.message, "type": kind, "param": None, "code": status}}


@pytest.mark.parametrize(
    ("field", "value"), [("guided_regex", "a{9}"), ("structured_outputs.choice", ["a"]), ("response_format", None)]
)
async def test_a_constraint_that_a_worker_gave_up_is_named_as_the_client_wrote_it(field: str, value: Any) -> None:
    name, _, kind = field.partition(".")
    fields = {name: {kind: value} if kind else value or {"type": "json_object"}}
    router = Router()
    router.core.script = answers(ending=InvalidArgument("constraint: costs too much", field="constraint"))
    answer = await router.complete(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert error["message"] == f"{field}: costs too much"


async def test_a_failure_in_mid_stream_is_an_error_event_and_then_done() -> None:
    router = Router()
    router.core.script = answers([5], ending=Unavailable("no decode worker"))
    chunks = events((await router.complete(stream=True)).content)
    assert text_of(chunks) == " 5"
    assert chunks[-1]["error"]["code"] == 503
    assert all(choice["finish_reason"] is None for chunk in chunks[:-1] for choice in chunk["choices"])


async def test_our_own_bugs_do_not_describe_themselves() -> None:
    router = Router()
    router.core.script = answers(ending=Internal("secret path"))
    answer = await router.complete()
    assert answer.status_code == 500 and "secret" not in answer.text


async def test_a_token_that_cannot_be_decoded_fails_its_own_request_only(caplog: pytest.LogCaptureFixture) -> None:
    router = Router()
    router.core.script = answers([123_456])
    assert (await router.complete()).status_code == 500
    assert "bug in the edge" in caplog.text
    await turns()
    assert router.edge.in_flight == 0
    router.core.script = answers([5])
    assert (await router.complete()).status_code == 200


async def test_an_answer_that_cannot_be_written_is_an_error_like_every_other(caplog: pytest.LogCaptureFixture) -> None:
    class Unnamed(OracleVocabulary):
        def token_text(self, token_id: int) -> str:
            raise RuntimeError("secret")

    router = Router(vocabulary=Unnamed(1_000))
    router.core.script = answers([5])
    answer = await router.complete(logprobs=1)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "InternalServerError")
    assert "secret" not in answer.text and "bug in the edge" in caplog.text
    call = Call(router.app, body(logprobs=1))
    with pytest.raises(RuntimeError):  # too late for an error: the server ends the connection
        await call.task
    assert [message["type"] for message in call.sent] == ["http.response.start"]


@pytest.mark.parametrize("path", http.NOT_YET)
async def test_what_is_not_there_yet_says_so(path: str) -> None:
    answer = await Router().request("POST", path, json={"messages": []})
    assert answer.status_code == 400
    message = f"{path}: not served yet; POST /v1/completions and /v1/chat/completions are"
    assert answer.json() == {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}


async def test_a_full_router_refuses_before_it_reads_a_body() -> None:
    router = Router(edge_config=edge.Config(requests_max=1))
    first = Call(router.app, body())
    await turns()
    sent: list[Any] = []
    await ask_with(router, [], sent)  # nothing to receive: reading would fail
    assert sent[0]["status"] == 429 and dict(sent[0]["headers"])[b"retry-after"] == b"1"
    first.disconnect()
    await first.task


async def test_bodies_are_counted_while_they_are_held_and_no_longer() -> None:
    size = len(body())
    router = Router(http_config=http.Config(bodies_held_bytes_max=size))
    gate = asyncio.Event()

    async def half_then_wait() -> dict[str, Any]:
        if not gate.is_set():
            gate.set()
            return {"type": "http.request", "body": body()[:1], "more_body": True}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        raise AssertionError

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    half = asyncio.create_task(router.app(scope, half_then_wait, send))
    await gate.wait()
    refused = Call(router.app, body())
    await refused.task
    assert refused.sent[0]["status"] == 429 and router.core.delivered == []
    half.cancel()
    await asyncio.gather(half, return_exceptions=True)
    router.core.script = answers([5])
    for _ in range(3):  # served ones give theirs back as well
        call = Call(router.app, body())
        await call.task
        assert call.sent[0]["status"] == 200


async def test_a_client_that_leaves_while_its_prompt_waits_submits_nothing() -> None:
    may_encode = threading.Event()

    class Waiting(OracleVocabulary):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            may_encode.wait(timeout=10)
            return super().encode(text)

    config = validation.Config(inline_characters_max=0)
    router = Router(vocabulary=Waiting(1_000), validation_config=config)
    call = Call(router.app, body(prompt="a"))
    await turns()
    call.disconnect()
    await call.task
    assert call.sent == [] and router.core.delivered == []
    may_encode.set()
    router.validator.close()


async def test_a_client_that_leaves_while_its_text_is_tokenized_is_answered_nothing() -> None:
    may_encode = threading.Event()

    class Waiting(OracleVocabulary):
        def encode_naming(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            may_encode.wait(timeout=10)
            return super().encode_naming(text)

    router = Router(vocabulary=Waiting(1_000), validation_config=validation.Config(inline_characters_max=0))
    call = Call(router.app, b'{"prompt":"a"}', path="/tokenize")
    await turns()
    call.disconnect()
    await call.task
    assert call.sent == []
    may_encode.set()
    router.validator.close()


async def test_text_becomes_tokens_and_tokens_become_text() -> None:
    router = Router()
    headers = {"x-request-id": "mine"}
    answer = await router.request("POST", "/tokenize", json={"prompt": " 5 6"}, headers=headers)
    assert (answer.json()["tokens"], answer.headers["x-request-id"]) == ([5, 6], "mine")
    assert (await router.request("POST", "/detokenize", json={"tokens": [5, 6]})).json() == {"prompt": " 5 6"}
    wrong = await router.request("POST", "/detokenize", json={"tokens": "x"}, headers=headers)
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tokens")
    assert (await router.request("GET", "/tokenizer_info")).status_code == 200


async def test_the_time_that_a_body_takes_counts_against_the_deadline() -> None:
    router = Router()
    router.core.script = answers([5])
    messages = [
        {"type": "http.request", "body": body(triptych={"deadline_ms": 100}), "more_body": True},
        {"type": "http.request", "body": b"", "more_body": False},
    ]
    inbox = iter(messages)

    async def receive() -> dict[str, Any]:
        router.now_us += 20_000
        message = next(inbox, None)
        if message is None:
            await asyncio.Event().wait()
            raise AssertionError
        return message

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await router.app(scope, receive, send)
    assert router.core.submits[0].deadline_ms == 60


async def test_more_than_the_limit_is_refused_and_an_ending_makes_room() -> None:
    router = Router(edge_config=edge.Config(requests_max=1))
    first = Call(router.app, body())
    await turns()
    refused = await router.complete()
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert len(router.core.submits) == 1
    router.core.tokens(1, 5)
    router.core.end(1)
    await first.task
    router.core.script = answers([5])
    assert (await router.complete()).status_code == 200


# -- departures --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_before", [0, 1, 3])
async def test_a_departure_cancels_exactly_once(stream: bool, tokens_before: int) -> None:
    router = Router()
    call = Call(router.app, body(stream=stream))
    await turns()
    for token in range(tokens_before):
        router.core.tokens(1, token)
        await turns()
    call.disconnect()
    await call.task
    await turns()
    assert router.core.cancels == [Cancel(1)]
    assert router.edge.in_flight == 0
    assert router.sample("triptych_requests_total", outcome="cancelled") == 1


async def test_late_tokens_of_a_departed_client_go_nowhere() -> None:
    router = Router()
    call = Call(router.app, body())
    await turns()
    call.disconnect()
    await turns(2)
    router.core.tokens(1, 5)
    await call.task
    assert router.core.cancels == [Cancel(1)]


async def test_a_departure_after_the_end_cancels_nothing() -> None:
    router = Router()
    router.core.script = answers([5])
    call = Call(router.app, body())
    await call.task
    call.disconnect()
    await turns()
    assert router.core.cancels == []


async def test_a_cancelled_handler_frees_its_request() -> None:
    router = Router()
    call = Call(router.app, body())
    await turns()
    call.task.cancel()
    await asyncio.gather(call.task, return_exceptions=True)
    await turns()
    assert router.core.cancels == [Cancel(1)] and router.edge.in_flight == 0


async def test_a_client_that_leaves_before_its_body_is_whole_submits_nothing() -> None:
    router = Router()
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []
    await ask_with(router, messages, sent)
    assert sent == [] and router.core.delivered == []


async def test_a_client_that_does_not_read_is_dropped_and_others_are_not() -> None:
    router = Router(edge_config=edge.Config(unread_tokens_max=8))
    slow, quick = Call(router.app, body()), Call(router.app, body())
    await turns()
    slow.reading.clear()
    for token in range(12):
        router.core.tokens(1, token)
        router.core.tokens(2, token)
        await turns(3)
    assert await asyncio.wait_for(slow.task, timeout=5) is None  # interrupted inside its send
    await turns()
    assert router.core.cancels == [Cancel(1)]
    assert router.sample("triptych_slow_readers_total") == 1
    router.core.end(2)
    await quick.task
    assert text_of(events(quick.body)) == "".join(f" {token}" for token in range(12))


async def test_the_core_is_never_called_from_inside_its_own_output() -> None:
    router = Router(edge_config=edge.Config(unread_tokens_max=2))
    call = Call(router.app, body())
    await turns()
    call.reading.clear()
    before = len(router.core.delivered)
    for token in range(8):
        router.core.tokens(1, token)  # no turn of the loop between these: nothing else can run
        assert len(router.core.delivered) == before
    await call.task
    await turns()
    assert router.core.cancels == [Cancel(1)]


async def test_abort_by_id_ends_the_request_and_unknown_ids_are_nothing() -> None:
    router = Router()
    call = Call(router.app, body())
    await turns()
    router.edge.abort("nobody")
    assert router.core.cancels == []
    router.edge.abort("id1")
    router.edge.abort("id1")
    await call.task
    await turns()
    assert router.core.cancels == [Cancel(1)]
    assert call.sent[0]["status"] == 499


async def test_a_cancellation_storm_leaves_nothing() -> None:
    router = Router()
    calls = [Call(router.app, body(stream=index % 2 == 0)) for index in range(100)]
    await turns()
    for index, call in enumerate(calls):
        if index % 3:
            router.core.tokens(index + 1, 5)
        call.disconnect()
        if index % 5 == 0:
            call.disconnect()
    await asyncio.gather(*(call.task for call in calls))
    await turns()
    assert sorted(cancel.key for cancel in router.core.cancels) == list(range(1, 101))
    assert router.edge.in_flight == 0


# -- bodies ------------------------------------------------------------------------------------------------------------
async def ask_with(router: Router, messages: list[dict[str, Any]], sent: list[Any]) -> None:
    inbox = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(inbox)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await router.app(scope, receive, send)


async def test_an_oversized_body_is_refused_while_it_arrives() -> None:
    router = Router(http_config=http.Config(body_bytes_max=100))
    taken = 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b"x" * 60, "more_body": True}  # never ends

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await router.app(scope, receive, send)
    error = msgspec.json.decode(sent[1]["body"])["error"]
    assert taken == 2 and sent[0]["status"] == 413
    assert (error["param"], error["message"]) == ("body", "body: at most 100 bytes")
    assert (b"connection", b"close") in sent[0]["headers"]


async def test_a_body_that_never_arrives_is_given_up() -> None:
    router = Router(http_config=http.Config(body_read_ms=1))
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await router.app(scope, receive, send)
    assert sent[0]["status"] == 408


async def test_a_body_in_pieces_is_one_body() -> None:
    router = Router()
    router.core.script = answers([5])
    whole = body(stream=False)
    messages = [{"type": "http.request", "body": whole[i : i + 1], "more_body": True} for i in range(len(whole))]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[Any] = []
    inbox = iter(messages)

    async def receive() -> dict[str, Any]:
        message = next(inbox, None)
        if message is None:
            await asyncio.Event().wait()
            raise AssertionError
        return message

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await router.app(scope, receive, send)
    assert sent[0]["status"] == 200


# -- the small endpoints -----------------------------------------------------------------------------------------------
async def test_the_models_list_names_the_model_and_its_length() -> None:
    answer = (await Router().request("GET", "/v1/models")).json()
    assert answer["object"] == "list"
    assert [(model["id"], model["object"], model["max_model_len"]) for model in answer["data"]] == [
        ("tiny", "model", 64)
    ]


async def test_health_is_empty_and_readiness_follows_the_core() -> None:
    router = Router()
    health = await router.request("GET", "/health")
    assert (health.status_code, health.content) == (200, b"")
    assert (await router.request("GET", "/ready")).status_code == 200
    router.state.ready = False
    not_ready = await router.request("GET", "/ready")
    assert (not_ready.status_code, not_ready.headers["retry-after"]) == (503, "1")
    assert (await router.request("GET", "/health")).status_code == 200


async def test_version_is_the_configured_one() -> None:
    router = Router(http_config=http.Config(version="1.2.3"))
    assert (await router.request("GET", "/version")).json() == {"version": "1.2.3"}


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/nothing", 404, "NotFoundError"),
        ("GET", "/v1/completions", 405, "MethodNotAllowedError"),
        ("POST", "/v1/models", 405, "MethodNotAllowedError"),
        ("GET", "/admin/v1/workers", 404, "NotFoundError"),
        ("POST", "/v1/completions/", 404, "NotFoundError"),
    ],
)
async def test_wrong_paths_and_methods_have_the_same_error_shape(
    method: str, path: str, status: int, kind: str
) -> None:
    answer = await Router().request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == (kind, status)


async def test_the_admin_port_lists_workers_and_serves_no_completions() -> None:
    router = Router()
    answer = await router.request("GET", "/admin/v1/workers", admin=True)
    worker = answer.json()["workers"][0]
    assert (worker["id"], worker["roles"], worker["epoch"], worker["state"]) == ("w1", ["prefill"], 3, "SERVING")
    assert (await router.request("POST", "/v1/completions", admin=True, json={})).status_code == 404
    for path in ("/health", "/ready", "/metrics"):
        assert (await router.request("GET", path, admin=True)).status_code == 200


@pytest.mark.parametrize("admin", [False, True])
async def test_both_ports_reset_the_prefix_cache_where_there_are_no_keys(admin: bool) -> None:
    router = Router()
    assert (await router.request("GET", "/reset_prefix_cache", admin=admin)).status_code == 405
    assert router.core.delivered == []
    answer = await router.request("POST", "/reset_prefix_cache", admin=admin)
    assert (answer.status_code, answer.content) == (200, b"")
    assert router.core.delivered == [ResetCache()]


async def test_metrics_are_the_operators_alone() -> None:
    router = Router()
    assert (await router.request("GET", "/metrics")).status_code == 404
    assert "triptych_requests_total" in (await router.request("GET", "/metrics", admin=True)).text


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_ping_is_for_those_who_expect_sagemakers(method: str) -> None:
    answer = await Router().request(method, "/ping")
    assert (answer.status_code, answer.content) == (200, b"")


async def test_the_load_is_the_number_of_requests_in_flight() -> None:
    router = Router()
    call = Call(router.app, body())
    await turns()
    assert (await router.request("GET", "/load")).json() == {"server_load": 1}
    call.disconnect()
    await call.task
    await turns()
    assert (await router.request("GET", "/load")).json() == {"server_load": 0}


async def test_the_description_of_the_port_names_every_path_that_is_served() -> None:
    router = Router(http_config=http.Config(version="1.2.3"))
    document = (await router.request("GET", "/openapi.json")).json()
    assert document["info"]["version"] == "1.2.3"
    for path, methods in document["paths"].items():
        for method in methods:
            answer = await router.request(method.upper(), path.replace("{name}", "tiny"), content=b"")
            assert answer.status_code not in (404, 405), (method, path)


# -- POST /abort_requests ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("id", ["cmpl-id1", "chatcmpl-id1", "id1"])
@pytest.mark.parametrize("admin", [False, True])
async def test_requests_end_by_the_ids_that_their_clients_were_given(id: str, admin: bool) -> None:
    router = Router()
    call, other = Call(router.app, body()), Call(router.app, body())
    await turns()
    answer = await router.request("POST", "/abort_requests", admin=admin, json={"request_ids": ["cmpl-id9", id, id]})
    assert (answer.status_code, answer.content) == (200, b"")
    await call.task
    await turns()
    assert router.core.cancels == [Cancel(1)] and call.sent[0]["status"] == 499
    other.disconnect()
    await other.task


@pytest.mark.parametrize("admin", [False, True])
@pytest.mark.parametrize("sent", [b"", b"[]", b"{}", b'{"request_ids":"id1"}', b'{"request_ids":[1]}', b"{" * 9_000])
async def test_ids_to_abort_are_a_list_of_strings(sent: bytes, admin: bool) -> None:
    router = Router()
    answer = await router.request("POST", "/abort_requests", admin=admin, content=sent)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "request_ids"
    assert error["message"] == "request_ids: must be a list of strings"


@pytest.mark.parametrize("admin", [False, True])
async def test_no_more_ids_are_taken_than_there_can_be_requests(admin: bool) -> None:
    sent = b'{"request_ids":["' + b"x" * limits.ABORT_BYTES_MAX + b'"]}'
    answer = await Router().request("POST", "/abort_requests", admin=admin, content=sent)
    assert answer.status_code == (413 if admin else 400) and str(limits.ABORT_BYTES_MAX) in answer.text


# -- logs --------------------------------------------------------------------------------------------------------------
def logged(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, Any]]:
    """What the lines of that message say beside it."""
    lines = [record for record in caplog.records if record.name == "triptych.router" and record.msg == message]
    standard = vars(logging.LogRecord("", 0, "", 0, "", (), None)).keys() | {"message", "asctime"}
    return [{name: value for name, value in vars(line).items() if name not in standard} for line in lines]


async def test_each_request_is_one_line_and_no_prompt_is_in_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    router = Router()
    router.core.script = answers([5], [6])
    router.now_us = 1_000
    answer = await router.complete(prompt="my secret", user="alice")
    await router.complete(prompt="my secret", temperature="hot")
    assert logged(caplog, "request") == [
        {
            "request_id": "id1",
            "label": "",
            "tenant": "",
            "status": "stop",
            "prompt_tokens": 9,
            "output_tokens": 2,
            "cached_tokens": 2,
            "image_tokens": 0,
            "image_hits": 0,
            "first_ms": 0.0,
            "second_ms": 0.0,
            "total_ms": 0.0,
            "slo_met": None,
            "attempts": 1,
            "encode": "",
            "prefill": "p1",
            "decode": "d1",
            "transfer_id": TRANSFER_ID,
            "codec": "raw",
            "codec_level": 0,
            "kv_bytes_raw": 4_000,
            "kv_bytes_wire": 1_000,
        }
    ]
    (refused,) = logged(caplog, "request refused")
    assert refused == {"status": "invalid_argument", "field": "temperature", "label": "", "tenant": ""}
    assert TRANSFER_ID not in answer.text, "for our log only"
    said = caplog.text + str([vars(record) for record in caplog.records])
    assert "secret" not in said and "alice" not in said and "hot" not in said


async def test_forged_log_lines_stay_inside_their_field(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    router = Router()
    router.core.script = answers([5])
    call = Call(router.app, body(), [(b"x-request-id", b"a status=stop\r\nrequest id=forged")])
    await call.task
    (line,) = logged(caplog, "request")
    assert line["label"] == "a_status_stop__request_id_forged" and line["status"] == "stop"


async def test_times_run_from_submit() -> None:
    router = Router()
    call = Call(router.app, body())
    await turns()
    for at_us, token in ((10_000, 5), (30_000, 6), (50_000, 7)):
        router.now_us = at_us
        router.core.tokens(1, token)
    router.now_us = 60_000
    router.core.end(1)
    await call.task
    assert router.sample("triptych_time_to_first_token_seconds_sum") == pytest.approx(0.010)
    assert router.sample("triptych_time_to_second_token_seconds_sum") == pytest.approx(0.030)
    assert router.sample("triptych_time_per_output_token_seconds_sum") == pytest.approx(0.020)
    assert router.sample("triptych_request_duration_seconds_sum") == pytest.approx(0.060)
    assert router.sample("triptych_kv_transfer_bytes_total", codec="raw", stage="wire") == STATS.kv_bytes_wire


def test_the_edge_needs_no_event_loop_to_exist() -> None:
    assert isinstance(Router().edge, Edge)


async def test_httpx_sees_a_well_formed_response() -> None:
    router = Router()
    router.core.script = answers([5])
    answer: httpx.Response = await router.complete()
    assert answer.headers["content-length"] == str(len(answer.content))
