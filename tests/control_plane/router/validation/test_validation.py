"""Every bad value is refused with the field's name and a fixed text; every neutral one passes."""

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.router.access.caller import Caller
from control_plane.router.access.tenants import Tenant
from control_plane.router.text.vocabulary import ModelCard, OracleVocabulary
from control_plane.router.validation import validator as validation
from control_plane.router.validation.prompt import CHARACTERS_PER_TEXT
from control_plane.router.validation.validator import NOT_SERVED, ValidatedRequest, Validator
from engine.base import limits
from engine.base.errors import DeadlineExceeded, InvalidArgument, NotFound, ResourceExhausted
from engine.types import Constraint, ConstraintKind, SamplingParams
from tests.control_plane.router.edge_fakes import CARD, Router

BIG = 1 << 63


def bad(name: str, *values: Any) -> Iterator[tuple[dict[str, Any], int, str]]:
    """Values that are refused under the field's own name."""
    return (({name: value}, 400, name) for value in values)


BAD_FIELDS: list[tuple[dict[str, Any], int, str]] = [
    # prompt
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": [""]}, 400, "prompt"),
    ({"prompt": 7}, 400, "prompt"),
    ({"prompt": True}, 400, "prompt"),
    ({"prompt": {"text": "a"}}, 400, "prompt"),
    ({"prompt": ["a", ""]}, 400, "prompt"),
    ({"prompt": [[1], []]}, 400, "prompt"),
    ({"prompt": ["a", [1]]}, 400, "prompt"),
    ({"prompt": ["a"] * 129}, 400, "prompt"),
    ({"prompt": [[1]] * 129}, 400, "prompt"),
    ({"prompt": ["a"] * 128, "n": 3}, 400, "n"),
    ({"prompt": ["a", 1]}, 400, "prompt"),
    ({"prompt": [1, "a"]}, 400, "prompt"),
    ({"prompt": [1, [2]]}, 400, "prompt"),
    ({"prompt": [[[1]]]}, 400, "prompt"),
    ({"prompt": [None]}, 400, "prompt"),
    ({"prompt": [True]}, 400, "prompt"),
    ({"prompt": [1, False]}, 400, "prompt"),
    ({"prompt": [1.0]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [1_000]}, 400, "prompt"),
    ({"prompt": [BIG]}, 400, "prompt"),
    ({"prompt": [1] * 64}, 400, "prompt"),
    ({"prompt": "x" * 64}, 400, "prompt"),
    ({"prompt": "x" * 100_000}, 400, "prompt"),
    # model
    ({"model": "other"}, 404, "model"),
    ({"model": 7}, 400, "model"),
    ({"model": ["tiny"]}, 400, "model"),
    # max_tokens
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": 1.0}, 400, "max_tokens"),
    ({"max_tokens": "16"}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": [1]}, 400, "max_tokens"),
    ({"max_tokens": 62}, 400, "max_tokens"),
    ({"max_tokens": 1 << 31}, 400, "max_tokens"),
    ({"max_tokens": BIG}, 400, "max_tokens"),
    # temperature, top_p
    ({"temperature": -0.1}, 400, "temperature"),
    ({"temperature": 100.1}, 400, "temperature"),
    ({"temperature": 1e308}, 400, "temperature"),
    ({"temperature": "1"}, 400, "temperature"),
    ({"temperature": True}, 400, "temperature"),
    ({"temperature": [1]}, 400, "temperature"),
    ({"temperature": {}}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_p": -0.0}, 400, "top_p"),
    ({"top_p": 1.0001}, 400, "top_p"),
    ({"top_p": -1}, 400, "top_p"),
    ({"top_p": "0.5"}, 400, "top_p"),
    ({"top_p": False}, 400, "top_p"),
    # seed
    ({"seed": -1}, 400, "seed"),
    ({"seed": 1.0}, 400, "seed"),
    ({"seed": "1"}, 400, "seed"),
    ({"seed": True}, 400, "seed"),
    ({"seed": BIG}, 400, "seed"),
    # stop tokens
    ({"stop_token_ids": 5}, 400, "stop_token_ids"),
    ({"stop_token_ids": "5"}, 400, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, 400, "stop_token_ids"),
    ({"stop_token_ids": [1_000]}, 400, "stop_token_ids"),
    ({"stop_token_ids": [1.0]}, 400, "stop_token_ids"),
    ({"stop_token_ids": [True]}, 400, "stop_token_ids"),
    ({"stop_token_ids": [[1]]}, 400, "stop_token_ids"),
    ({"stop_token_ids": [1] * 65}, 400, "stop_token_ids"),
    # switches
    ({"ignore_eos": 1}, 400, "ignore_eos"),
    ({"ignore_eos": "true"}, 400, "ignore_eos"),
    ({"stream": 1}, 400, "stream"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": False, "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": True, "stream_options": []}, 400, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, 400, "stream_options.include_usage"),
    (
        {"stream": True, "stream_options": {"continuous_usage_stats": "no"}},
        400,
        "stream_options.continuous_usage_stats",
    ),
    # our own object
    ({"triptych": []}, 400, "triptych"),
    ({"triptych": "raw"}, 400, "triptych"),
    ({"triptych": {"codecs": "raw"}}, 400, "triptych.codecs"),
    ({"triptych": {"zzz": 1}}, 400, "triptych.zzz"),
    ({"triptych": {"codec": "zip"}}, 400, "triptych.codec"),
    ({"triptych": {"codec": 1}}, 400, "triptych.codec"),
    ({"triptych": {"codec": ["raw"]}}, 400, "triptych.codec"),
    ({"triptych": {"kl_budget": -0.001}}, 400, "triptych.kl_budget"),
    ({"triptych": {"kl_budget": 1.001}}, 400, "triptych.kl_budget"),
    ({"triptych": {"kl_budget": "0.01"}}, 400, "triptych.kl_budget"),
    ({"triptych": {"kl_budget": True}}, 400, "triptych.kl_budget"),
    ({"triptych": {"slo": 5}}, 400, "triptych.slo"),
    ({"triptych": {"slo": {"ttft": 5}}}, 400, "triptych.slo.ttft"),
    ({"triptych": {"slo": {"ttft_ms": 0}}}, 400, "triptych.slo.ttft_ms"),
    ({"triptych": {"slo": {"tpot_ms": 1.5}}}, 400, "triptych.slo.tpot_ms"),
    ({"triptych": {"slo": {"tpot_ms": 600_001}}}, 400, "triptych.slo.tpot_ms"),
    ({"vllm_xargs": []}, 400, "vllm_xargs"),
    ({"vllm_xargs": {"codec": "zip"}}, 400, "vllm_xargs.codec"),
    ({"vllm_xargs": {"codec": ["raw"]}}, 400, "vllm_xargs.codec"),
    ({"vllm_xargs": {"kl_budget": 2}}, 400, "vllm_xargs.kl_budget"),
    ({"vllm_xargs": {"deadline_ms": "9"}}, 400, "vllm_xargs.deadline_ms"),
    *bad("request_id", 7, [], "x" * 129),
    *bad("session_id", 7, {}, "x" * 129),
    ({"triptych": {"deadline_ms": 0}}, 400, "triptych.deadline_ms"),
    ({"triptych": {"deadline_ms": 600_001}}, 400, "triptych.deadline_ms"),
    ({"triptych": {"deadline_ms": 1.5}}, 400, "triptych.deadline_ms"),
    ({"triptych": {"deadline_ms": True}}, 400, "triptych.deadline_ms"),
    # choices
    *bad("n", 0, 17, 10**6, True, 1.0, "2", [2]),
    *bad("best_of", 2, 0, True, "1"),
    ({"n": 2, "best_of": 3}, 400, "best_of"),
    *bad("priority", 1.5, "0", True, (1 << 20) + 1, -(1 << 20) - 1),
    *bad("cache_salt", "", "x" * 129, 7, ["s"]),
    # how to pick tokens
    *bad("top_k", -5, 1.0, "50", True, (1 << 20) + 1),
    *bad("min_p", -0.1, 1.1, "0", True),
    *bad("presence_penalty", 2.1, -2.1, "0", True, 1e308),
    *bad("frequency_penalty", 2.1, -1e308, "0", False),
    *bad("repetition_penalty", 0, -1, 100.1, "1", True),
    *bad("min_tokens", -1, 1.0, "1", True, 17),
    ({"min_tokens": 3, "max_tokens": 2}, 400, "min_tokens"),
    *bad("logit_bias", [], "5", {"5": 101}, {"5": -100.5}, {"5": "1"}, {"5": None}, {"5": True}),
    *bad("logit_bias", {"x": 1}, {"-1": 1}, {"1000": 1}, {"05": 1}, {"+5": 1}, {" 5": 1}, {"": 1}, {"\u0665": 1}),
    *bad("logit_bias", {"9" * 5_000: 1}, {str(token): 0 for token in range(1_025)}),
    *bad("allowed_token_ids", [], 5, "5", [-1], [1_000], [True], [1.0], [1] * 1_025),
    *bad("bad_words", "x", [""], [" "], [7], [None], ["x"] * 65, ["x" * 257], ["x" * 256] * 17),
    ({"bad_words": ["é" * 250] * 2 + ["ü" * 20] * 2}, 400, "bad_words"),
    # where to stop
    *bad(
        "stop", 7, True, False, {}, [""], ["a", ""], [7], ["x"] * 17, "x" * 257, ["x" * 257], ["x" * 129] * 16, [["x"]]
    ),
    *bad("include_stop_str_in_output", 1, "true"),
    # what the answer shows
    *bad("echo", 0, "true", 1),
    *bad("logprobs", -1, -2, 21, True, False, 1.0, "5"),
    *bad("prompt_logprobs", -1, 21, True, "1"),
    ({"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs"),
    *bad("return_token_ids", 1, "yes"),
    *bad("return_tokens_as_token_ids", 1, "yes"),
    *bad("skip_special_tokens", 0, "no"),
    # the prompt
    *bad("add_special_tokens", 0, "no"),
    *bad("truncate_prompt_tokens", 0, -2, 131_073, 1.0, "5", True),
    # constraints
    *bad("response_format", "json_object", [], {"type": "xml"}, {"type": ["text"]}, {"kind": "text"}),
    *bad("response_format", {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "x"}}),
    *bad("response_format", {"type": "json_schema", "json_schema": {"schema": 7}}),
    *bad("structured_outputs", "json", [], {"xml": "x"}, {"structural_tag": "{}"}),
    ({"structured_outputs": {"json": 7}}, 400, "structured_outputs.json"),
    ({"structured_outputs": {"json_object": 1}}, 400, "structured_outputs.json_object"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, 400, "structured_outputs.choice"),
    *bad("guided_json", 7, True, "{", "[]", "7", ["x"], "[" * 10_000, {"hostile": 1}),
    *bad("guided_regex", "", 7, ["a"], "hostile"),
    *bad("guided_choice", [], "a", [""], [7], ["a", None]),
    *bad("guided_grammar", "", 7, {}),
    ({"guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, 400, "guided_regex"),
    # known, not served, and would change the answer
    *bad("suffix", "x"),
    *bad("length_penalty", 0.5, True),
    *bad("use_beam_search", True),
    *bad("spaces_between_special_tokens", False),
    *bad("tools", [{"type": "function"}]),
    *bad("tool_choice", "required"),
    *bad("functions", [{}]),
    *bad("logits_processors", ["x"]),
    *bad("prompt_embeds", "AAAA"),
    *bad("kv_transfer_params", {"do_remote_decode": True}),
]

BAD_BODIES: list[bytes] = [
    b"",
    b"{",
    b"nonsense",
    b"[]",
    b'"text"',
    b"7",
    b"null",
    b"{} {}",
    b"\xef\xbb\xbf{}",
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\\udc00 x"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": Infinity}',
    b'{"prompt": "a", "temperature": -Infinity}',
    b'{"prompt": "a", "temperature": 1e400}',
    b'{"prompt": "a", "seed": 1' + b"0" * 5_000 + b"}",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"a":' * 50_000,
    b"{'prompt': 'a'}",
    b"prompt=a",
]


def test_the_tables_are_as_long_as_promised() -> None:
    assert len(BAD_FIELDS) + len(BAD_BODIES) >= 80


@pytest.mark.parametrize(("fields", "status", "param"), BAD_FIELDS, ids=lambda value: str(value)[:50])
async def test_bad_values_are_refused_by_name(fields: dict[str, Any], status: int, param: str) -> None:
    router = Router()
    answer = await router.complete(**fields)
    router.validator.close()
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, status)
    assert error["message"].startswith(param.split(".")[0]) and len(error["message"]) < 250
    assert router.core.delivered == [] and router.edge.in_flight == 0


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda value: repr(value[:30]))
async def test_bad_bodies_are_refused(body: bytes) -> None:
    router = Router()
    answer = await router.request("POST", "/v1/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")
    assert router.core.delivered == []


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
async def test_neutral_values_and_null_are_accepted(name: str) -> None:
    router = Router()
    for value in (None, *NOT_SERVED[name]):
        assert (await router.validator.validate({"prompt": [1], name: value})).token_ids == (1,)


async def test_null_means_the_default_everywhere() -> None:
    router = Router()
    names = validation.SERVED - {"prompt"}
    request = await router.validator.validate({"prompt": [1], **dict.fromkeys(names)})
    assert request == await router.validator.validate({"prompt": [1]})
    assert request == ValidatedRequest(token_ids=(1,), sampling=SamplingParams(seed=77))


SAMPLING: list[tuple[str, Any, Any]] = [  # a field, a value that is accepted, and what becomes of it
    ("top_k", -1, 0),
    ("top_k", 0, 0),
    ("top_k", 50, 50),
    ("min_p", 1, 1.0),
    ("presence_penalty", -2, -2.0),
    ("frequency_penalty", 2, 2.0),
    ("repetition_penalty", 100, 100.0),
    ("min_tokens", 16, 16),
    ("logprobs", 0, 0),
    ("logprobs", 20, 20),
    ("prompt_logprobs", 20, 20),
    ("logit_bias", {}, ()),
    ("logit_bias", {"5": -100, "0": 0.5}, ((5, -100.0), (0, 0.5))),
    ("allowed_token_ids", [5, 999], (5, 999)),
    ("stop_token_ids", [1] * 64, (1,) * 64),
    ("bad_words", [], ()),
    ("bad_words", ["a"], ((97,), (32, 97))),  # inside a text a space comes before it
    ("bad_words", [" 7", "7"], ((55,), (7,))),
]


@pytest.mark.parametrize(("name", "value", "meaning"), SAMPLING)
async def test_sampling_fields_reach_the_parameters(name: str, value: Any, meaning: Any) -> None:
    sampling = (await make_validator().validate({"prompt": [1], name: value})).sampling
    assert sampling == replace(SamplingParams(seed=1), **{name: meaning})


ANSWER: list[tuple[str, Any, str, Any]] = [
    ("n", 16, "choices", 16),
    ("priority", -(1 << 20), "priority", -(1 << 20)),
    ("stop", "", "stop", ()),
    ("stop", [], "stop", ()),
    ("stop", "END", "stop", ("END",)),
    ("stop", ["x" * 256] * 8, "stop", ("x" * 256,) * 8),
    ("include_stop_str_in_output", True, "include_stop", True),
    ("skip_special_tokens", False, "skip_special_tokens", False),
    ("return_token_ids", True, "return_token_ids", True),
    ("return_tokens_as_token_ids", True, "tokens_as_ids", True),
]


@pytest.mark.parametrize(("name", "value", "attribute", "meaning"), ANSWER)
async def test_fields_of_the_answer_reach_the_request(name: str, value: Any, attribute: str, meaning: Any) -> None:
    validator = make_validator(clock_us=lambda: 0)
    assert await validator.validate({"prompt": [1], name: value}) == replace(
        await validator.validate({"prompt": [1]}), **{attribute: meaning}
    )


async def test_a_salt_parts_tenants_and_a_user_does_not() -> None:
    validator = make_validator()
    alike = [{}, {"user": "alice"}, {"user": "bob"}]
    assert {(await validator.validate({"prompt": [1], **fields})).cache_salt for fields in alike} == {""}
    salts = ["a", "b", "x" * 128]
    assert (
        len({(await validator.validate({"prompt": [1], "cache_salt": salt})).cache_salt for salt in salts} - {""}) == 3
    )


async def test_echo_asks_for_scores_of_the_prompt_and_the_larger_wish_wins() -> None:
    validator = make_validator()
    wishes: list[tuple[dict[str, Any], int]] = [
        ({"logprobs": 3}, 3),
        ({"logprobs": 3, "prompt_logprobs": 5}, 5),
        ({"logprobs": 3, "prompt_logprobs": 1}, 3),
    ]
    for fields, scores in wishes:
        request = await validator.validate({"prompt": [1], "echo": True, **fields})
        assert (request.sampling.logprobs, request.sampling.prompt_logprobs) == (3, scores)
        assert request.prompt_logprobs == fields.get("prompt_logprobs")
    plain = await validator.validate({"prompt": [1], "logprobs": 3})
    assert plain.sampling.prompt_logprobs is None


async def test_echo_repeats_the_clients_text_or_what_its_ids_say() -> None:
    validator = make_validator()
    echoes: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "a b"}, "a b"),
        ({"prompt": [5, 6]}, " 5 6"),
        ({"prompt": " 5 6 7", "truncate_prompt_tokens": 2}, " 6 7"),
        ({"prompt": " 5 6", "truncate_prompt_tokens": 2}, " 5 6"),
    ]
    for fields, text in echoes:
        assert (await validator.validate({"echo": True, **fields})).echo_text == text
        assert (await validator.validate(fields)).echo_text is None


async def test_truncation_keeps_the_end_of_a_prompt() -> None:
    validator = make_validator()

    async def kept(count: int, **fields: Any) -> tuple[int, ...]:
        return (
            await validator.validate({"prompt": list(range(100)), "truncate_prompt_tokens": count, **fields})
        ).token_ids

    assert await kept(3) == (97, 98, 99)
    assert await kept(-1) == tuple(range(100 - (64 - 16), 100))
    assert await kept(-1, max_tokens=4) == tuple(range(40, 100))
    assert await kept(-1, max_tokens=0) == tuple(range(37, 100))  # room for one token all the same
    with pytest.raises(InvalidArgument, match="prompt: at most 63 tokens, got 64"):
        await kept(64)


async def test_an_answer_holds_so_many_logprobs_and_no_more() -> None:
    card = replace(CARD, max_model_len=100_000)
    validator = make_validator(card=card)
    scoring = {"prompt": [1] * 60_000, "max_tokens": 1, "echo": True}
    assert await validator.validate({**scoring, "logprobs": 1})
    for refused in ({"logprobs": 2}, {"logprobs": 1, "n": 2}, {"logprobs": 1, "prompt_logprobs": 1}):
        with pytest.raises(InvalidArgument, match="logprobs: at most 131072 log-probabilities in one answer"):
            await validator.validate({**scoring, **refused})
    long = {"prompt": [1], "max_tokens": 60_000, "logprobs": 2}
    with pytest.raises(InvalidArgument, match="logprobs: at most 131072"):
        await validator.validate(long)
    assert await validator.validate({**long, "stream": True})  # each chunk is an answer by itself


# -- constraints -------------------------------------------------------------------------------------------------------
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
SCHEMA_TEXT = '{"type":"object","properties":{"b":{},"a":{}}}'


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "json_schema", SCHEMA_TEXT),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, "json_schema", SCHEMA_TEXT),
        ({"structured_outputs": {"json_object": True, "disable_any_whitespace": False}}, "json_object", ""),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a","b"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "grammar", 'start: "a"'),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA_TEXT),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["é"]}, "choice", '["é"]'),
        ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
    ],
)
async def test_a_constraint_has_several_spellings(fields: dict[str, Any], kind: str, text: str) -> None:
    router = Router()
    constraint = Constraint(ConstraintKind(kind), text)
    assert (await router.validator.validate({"prompt": [1], **fields})).sampling.constraint == constraint
    assert router.constraints == [constraint]
    router.validator.close()


@pytest.mark.parametrize("fields", [{}, {"response_format": {"type": "text"}}, {"response_format": {}}])
async def test_no_constraint_is_checked_where_there_is_none(fields: dict[str, Any]) -> None:
    router = Router()
    assert (await router.validator.validate({"prompt": [1], **fields})).sampling.constraint is None
    assert router.constraints == []


async def test_a_refused_constraint_is_named_as_the_client_wrote_it() -> None:
    router = Router()
    with pytest.raises(InvalidArgument) as raised:
        await router.validator.validate({"prompt": [1], "structured_outputs": {"regex": "hostile"}})
    assert raised.value.field == "structured_outputs.regex"
    assert raised.value.message == "structured_outputs.regex: too large when compiled"
    router.validator.close()


async def test_constraints_are_checked_off_the_loop_not_too_many_and_not_for_ever() -> None:
    may_end = threading.Event()
    threads: list[str] = []

    def check(constraint: Constraint) -> None:
        threads.append(threading.current_thread().name)
        may_end.wait(timeout=10)

    validator = make_validator(validation.Config(constraint_checks_waiting_max=1), check_constraint=check)
    fields = {"prompt": [1], "guided_regex": "a"}
    first = asyncio.create_task(validator.validate(fields))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted, match="too many constraints at once"):
        await validator.validate(fields)
    assert await validator.validate({"prompt": [1]})  # nobody else waits for it
    may_end.set()
    assert await first
    may_end.clear()
    with pytest.raises(DeadlineExceeded):
        await validator.validate({**fields, "triptych": {"deadline_ms": 1}})
    may_end.set()
    validator.close()
    assert all(name.startswith("check") for name in threads)


@pytest.mark.parametrize("prompt", ["\x05", ["\x05"], [5], [[5]], " 5", [" 5"]])
async def test_one_prompt_has_several_spellings(prompt: Any) -> None:
    (request,) = await Router().validator.completion(json.dumps({"prompt": prompt}).encode())
    assert request.token_ids == (5,)
    assert await Router().validator.validate({"prompt": prompt}) == request


@pytest.mark.parametrize("text", ["\x00", "\ufeffa", "\u202eabc", "e\u0301" * 9, "😀", "a\r\nb"])
async def test_odd_but_valid_text_is_a_prompt(text: str) -> None:
    router = Router()
    (request,) = await router.validator.completion(json.dumps({"prompt": text}).encode())
    assert request.token_ids == tuple(text.encode())


async def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    router = Router()
    request = await router.validator.validate({"prompt": [1] * 63})
    assert request.sampling.max_tokens == 1  # the default shrinks
    with pytest.raises(InvalidArgument, match="at most 64 tokens, got 63 \\+ 2"):
        await router.validator.validate({"prompt": [1] * 63, "max_tokens": 2})
    with pytest.raises(InvalidArgument, match="prompt: at most 63 tokens, got 64"):
        await router.validator.validate({"prompt": [1] * 64})


async def test_minus_zero_is_zero_and_integers_are_numbers() -> None:
    request = await Router().validator.validate({"prompt": [1], "temperature": -0.0, "top_p": 1})
    assert str(request.sampling.temperature) == "0.0" and request.sampling.greedy


async def test_a_seed_is_drawn_only_when_none_is_given() -> None:
    draws = iter([11, 12])
    validator = make_validator(draw_seed=lambda: next(draws))
    seeds = [(await validator.validate({"prompt": [1], **given})).sampling.seed for given in ({}, {"seed": 0}, {})]
    assert seeds == [11, 0, 12]


async def test_the_nearest_key_is_suggested_and_a_long_one_is_cut() -> None:
    validator = make_validator()
    with pytest.raises(InvalidArgument, match="did you mean 'deadline_ms'"):
        await validator.validate({"prompt": [1], "triptych": {"deadline": 5}})
    with pytest.raises(InvalidArgument) as raised:
        await validator.validate({"prompt": [1], "triptych": {"x\n" * 100_000: 5}})
    assert len(raised.value.message) < 250 and "\n" not in raised.value.message


async def test_unknown_fields_are_accepted_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    router = Router()
    for _ in range(3):
        fields = {"prompt": [1], "foo": "secret", "stream": True, "stream_options": {"bar": 1}, "evil\n": 0}
        await router.validator.validate(fields)
    assert router.sample("triptych_unknown_fields_total") == 9
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(messages) == [
        f"unknown request field accepted and ignored name={name!r}" for name in ("evil\n", "foo", "stream_options.bar")
    ]
    assert all("\n" not in message for message in messages)


async def test_names_that_are_remembered_are_bounded() -> None:
    counted: list[int] = []
    unknown = validation.UnknownFields(counted.append, names_max=2)
    unknown.note(f"field{index}" for index in range(1_000))
    assert counted == [1_000] and len(unknown._logged) == 2


async def test_long_prompts_are_encoded_off_the_loop_and_not_too_many_at_once() -> None:
    config = validation.Config(inline_characters_max=2, encodes_waiting_max=0)
    validator = make_validator(config=config)
    assert (await validator.validate({"prompt": "ab"})).token_ids == (97, 98)
    with pytest.raises(ResourceExhausted):
        await validator.validate({"prompt": "abc"})
    validator = make_validator(config=validation.Config(inline_characters_max=2))
    assert (await validator.validate({"prompt": "abc"})).token_ids == (97, 98, 99)
    validator.close()


class SlowVocabulary(OracleVocabulary):
    """Encodes when it is told to, as a thread that is behind with its work does."""

    def __init__(self) -> None:
        super().__init__(CARD.vocab_size)
        self.may_encode = threading.Event()
        self.encoded: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.may_encode.wait(timeout=10)
        self.encoded.append(text)
        return super().encode(text)


async def test_text_that_cannot_fit_is_refused_unencoded() -> None:
    vocabulary = SlowVocabulary()
    validator = make_validator(vocabulary=vocabulary)
    longest = 63 * (vocabulary.characters_per_token_max or 0)
    with pytest.raises(InvalidArgument, match=f"at most 63 tokens, got {longest + 1} characters of text"):
        await validator.validate({"prompt": "x" * (longest + 1)})
    assert vocabulary.encoded == []


async def test_a_deadline_runs_from_arrival() -> None:
    now_us = 5_000_000
    validator = make_validator(clock_us=lambda: now_us)
    fields = {"prompt": [1], "triptych": {"deadline_ms": 100}}
    assert (await validator.validate(fields)).deadline_ms == 100
    assert (await validator.validate(fields, Caller(arrived_us=now_us - 40_000))).deadline_ms == 60
    with pytest.raises(DeadlineExceeded):
        await validator.validate(fields, Caller(arrived_us=now_us - 100_000))


async def test_a_prompt_waits_for_its_encoding_no_longer_than_its_deadline() -> None:
    vocabulary = SlowVocabulary()
    validator = make_validator(validation.Config(inline_characters_max=0), vocabulary=vocabulary)
    with pytest.raises(DeadlineExceeded):
        await validator.validate({"prompt": "a", "triptych": {"deadline_ms": 1}})
    vocabulary.may_encode.set()
    validator.close()


async def test_who_stops_waiting_in_the_queue_is_not_encoded() -> None:
    vocabulary = SlowVocabulary()
    validator = make_validator(validation.Config(inline_characters_max=0, encodes_waiting_max=2), vocabulary=vocabulary)
    first, second = (asyncio.create_task(validator.validate({"prompt": text})) for text in "ab")
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    third = asyncio.create_task(validator.validate({"prompt": "c"}))  # there is room for it again
    await asyncio.sleep(0)
    vocabulary.may_encode.set()
    await asyncio.gather(first, third)
    assert vocabulary.encoded == ["a", "c"]
    validator.close()


async def test_one_tenants_long_prompts_do_not_shut_anothers_out() -> None:
    vocabulary = SlowVocabulary()
    config = validation.Config(inline_characters_max=0, encodes_waiting_max=10, tenants=2)
    validator = make_validator(config, vocabulary=vocabulary)
    red, blue = Caller(tenant=Tenant("red")), Caller(tenant=Tenant("blue"))
    flood = [asyncio.create_task(validator.validate({"prompt": "r"}, red)) for _ in range(10)]
    await asyncio.sleep(0)
    asked: list[Any] = [validator.validate({"prompt": "b"}, blue), validator.tokenize(b'{"prompt":"t"}', blue.tenant)]
    served = [asyncio.create_task(each) for each in asked]
    await asyncio.sleep(0)
    vocabulary.may_encode.set()
    await asyncio.gather(*served)
    ended = await asyncio.gather(*flood, return_exceptions=True)
    assert [type(each) for each in ended] == [ValidatedRequest] * 8 + [ResourceExhausted] * 2
    assert vocabulary.encoded[:5] == ["r", "r", "b", "r", "t"]
    validator.close()


async def test_bad_words_weigh_what_their_texts_do() -> None:
    inline = len("bad bad") + CHARACTERS_PER_TEXT
    validator = make_validator(validation.Config(inline_characters_max=inline, encodes_waiting_max=0))
    assert len((await validator.validate({"prompt": [1], "bad_words": ["bad"]})).sampling.bad_words) == 2
    with pytest.raises(ResourceExhausted):
        await validator.validate({"prompt": [1], "bad_words": ["bad", "a"]})
    validator = make_validator(validation.Config(inline_characters_max=inline))
    assert len((await validator.validate({"prompt": [1], "bad_words": ["bad", "a"]})).sampling.bad_words) == 4
    validator.close()


async def test_an_unknown_model_is_not_found_and_none_is_the_only_one() -> None:
    validator = make_validator()
    with pytest.raises(NotFound):
        await validator.validate({"prompt": [1], "model": "gpt-4"})
    assert await validator.validate({"prompt": [1], "model": "tiny"})


async def test_a_codec_is_carried_only_if_it_is_one_of_ours() -> None:
    validator = make_validator(clock_us=lambda: 0)
    request = await validator.validate({"prompt": [1], "triptych": {"codec": "raw", "deadline_ms": 9}})
    assert (request.codec, request.deadline_ms) == ("raw", 9)


async def test_a_budget_is_a_number_of_nats_or_nothing_said() -> None:
    validator = make_validator()
    for said, budget in ((0, 0.0), (0.003, 0.003), (1, 1.0), (None, None)):
        request = await validator.validate({"prompt": [1], "triptych": {"kl_budget": said}})
        assert (request.kl_budget, request.codec) == (budget, "")
    with pytest.raises(InvalidArgument) as caught:
        await validator.validate({"prompt": [1], "triptych": {"kl_budget": 2}})
    assert caught.value.message == "triptych.kl_budget: must be a number in [0, 1]"


# -- several prompts ---------------------------------------------------------------------------------------------------
async def completion(validator: Validator, **fields: Any) -> list[ValidatedRequest]:
    return await validator.completion(json.dumps(fields).encode())


@pytest.mark.parametrize("prompts", [["a", "bc", "a"], [[97], [98, 99], [97]]])
async def test_each_prompt_of_a_list_is_a_request_in_its_place(prompts: Any) -> None:
    draws = iter(range(11, 99))
    validator = make_validator(draw_seed=lambda: next(draws), clock_us=lambda: 0)
    requests = await completion(validator, prompt=prompts, max_tokens=5, n=2, stop="x")
    assert [request.token_ids for request in requests] == [(97,), (98, 99), (97,)]
    assert [request.sampling.seed for request in requests] == [11, 12, 13]
    alike = {replace(request, token_ids=(), sampling=replace(request.sampling, seed=0)) for request in requests}
    assert len(alike) == 1
    seeded = await completion(validator, prompt=prompts, seed=5)
    assert [request.sampling.seed for request in seeded] == [5, 5, 5]


async def test_each_prompt_has_its_own_room_and_echo() -> None:
    validator = make_validator()
    short, long = await completion(validator, prompt=[" 5", " 6" * 60], echo=True)
    assert (short.sampling.max_tokens, long.sampling.max_tokens) == (16, 4)
    assert (short.echo_text, long.echo_text) == (" 5", " 6" * 60)
    kept = await completion(validator, prompt=[" 5 6 7", " 8"], echo=True, truncate_prompt_tokens=2)
    assert [request.echo_text for request in kept] == [" 6 7", " 8"]
    of_ids = await completion(validator, prompt=[[5, 6], [7]], echo=True)
    assert [request.echo_text for request in of_ids] == [" 5 6", " 7"]


async def test_prompts_together_have_limits() -> None:
    card = replace(CARD, max_model_len=200_000)
    validator = make_validator(card=card, clock_us=lambda: 0)
    half = [1] * (limits.PROMPT_TOKENS_MAX // 2)
    assert len(await completion(validator, prompt=[half, half])) == 2
    with pytest.raises(InvalidArgument, match="prompt: at most 131072 tokens"):
        await completion(validator, prompt=[half, half, [1]])
    with pytest.raises(InvalidArgument, match="prompt: at most 131072 tokens in all prompts together"):
        await completion(validator, prompt=["x" * len(half), "x" * len(half), "x"])
    assert len(await completion(validator, prompt=[[1]] * 128, n=2)) == 128
    scoring: dict[str, Any] = {"prompt": [half, half[1:]], "max_tokens": 1, "echo": True}
    with pytest.raises(InvalidArgument, match="logprobs: at most 131072 log-probabilities in one answer"):
        await completion(validator, **scoring, logprobs=1)
    assert await completion(validator, **{**scoring, "prompt": [half[2:]]}, logprobs=1)
    validator.close()


async def test_many_short_prompts_are_one_long_one() -> None:
    config = validation.Config(inline_characters_max=5 + 4 * CHARACTERS_PER_TEXT, encodes_waiting_max=0)
    validator = make_validator(config)
    assert len(await completion(validator, prompt=["a"] * 5)) == 5
    with pytest.raises(ResourceExhausted):
        await completion(validator, prompt=["a"] * 6)


async def test_only_one_prompt_comes_as_fields() -> None:
    with pytest.raises(InvalidArgument, match="prompt: only one prompt at a time here"):
        await make_validator().validate({"prompt": ["a", "b"]})


# -- who asks ----------------------------------------------------------------------------------------------------------
async def test_a_caller_is_carried_and_the_body_cannot_change_its_tenant() -> None:
    caller = Caller(tenant=Tenant("acme"), label="mine", ttft_slo_ms=100, tpot_slo_ms=20)
    validator = make_validator()
    request = await validator.validate({"prompt": [1], "tenant": "other", "user": "other"}, caller)
    assert (request.tenant, request.label, request.ttft_slo_ms, request.tpot_slo_ms) == ("acme", "mine", 100, 20)
    slo = {"triptych": {"slo": {"ttft_ms": 7}}}
    request = await validator.validate({"prompt": [1], "request_id": "theirs", **slo}, caller)
    assert (request.label, request.ttft_slo_ms, request.tpot_slo_ms) == ("mine", 7, 20)
    assert (await validator.validate({"prompt": [1], "request_id": "a b\n"})).label == "a_b_"


@pytest.mark.parametrize("value", [0, -1, 600_001])
async def test_targets_of_headers_have_the_same_limits(value: int) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await make_validator().validate({"prompt": [1]}, Caller(ttft_slo_ms=value))
    assert raised.value.field == "x-slo-ttft-ms"


async def test_knobs_may_come_as_vllms_and_ours_come_first() -> None:
    counted: list[int] = []
    validator = make_validator(count_unknown=counted.append, clock_us=lambda: 0)
    xargs = {"codec": "raw", "kl_budget": 0.5, "deadline_ms": 9, "their_own": [1]}
    request = await validator.validate({"prompt": [1], "vllm_xargs": xargs})
    assert (request.codec, request.kl_budget, request.deadline_ms, counted) == ("raw", 0.5, 9, [1])
    request = await validator.validate({"prompt": [1], "vllm_xargs": xargs, "triptych": {"kl_budget": 0.25}})
    assert (request.codec, request.kl_budget) == ("raw", 0.25)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(validation.COMPLETIONS.shape.known)), anything, max_size=5))
async def test_any_values_validate_within_the_limits_or_are_refused(fields: dict[str, Any]) -> None:
    validator = make_validator()
    try:
        request = await validator.validate({"prompt": [1], **fields})
    except InvalidArgument as error:
        assert error.field is not None
        return
    assert all(type(token) is int and 0 <= token < CARD.vocab_size for token in request.token_ids)
    assert 0 < len(request.token_ids) + request.sampling.max_tokens <= CARD.max_model_len
    assert 0 < request.deadline_ms <= limits.REQUEST_DEADLINE_MS_MAX


def make_validator(
    config: validation.Config | None = None,
    card: ModelCard = CARD,
    draw_seed: Any = lambda: 1,
    vocabulary: OracleVocabulary | None = None,
    check_constraint: validation.CheckConstraint = lambda constraint: None,
    count_unknown: Any = lambda count: None,
    **others: Any,
) -> Validator:
    return Validator(
        config or validation.Config(),
        card=card,
        vocabulary=vocabulary or OracleVocabulary(card.vocab_size),
        draw_seed=draw_seed,
        count_unknown=count_unknown,
        check_constraint=check_constraint,
        **others,
    )
