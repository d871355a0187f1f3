"""Chats: vLLM's order of chunks, and a streamed answer put together is the whole one."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.router.requests import Cancel
from control_plane.router.text.vocabulary import TokenizerVocabulary
from engine.base.errors import Unavailable
from engine.types import FinishReason, TokenLogprobs
from tests.control_plane.router.edge_fakes import (
    CARD,
    Call,
    FakeCore,
    Router,
    Script,
    answers,
    chat_body,
    events,
    in_turns,
    says,
    score,
    template,
    turns,
)
from tests.control_plane.router.text.test_detokenizer import byte_level_tokenizer

CHAT = "/v1/chat/completions"
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


def chat_router(**options: Any) -> Router:
    return Router(chat=template(), **options)


def assembled(chunks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a streamed answer, put together as a client would."""
    choices: dict[int, dict[str, Any]] = {}
    for part in (part for chunk in chunks for part in chunk["choices"]):
        delta = dict(part["delta"])
        if part["index"] not in choices:
            assert delta == {"role": "assistant", "content": ""}  # who speaks comes before what is said
            message = delta | {"refusal": None, "tool_calls": []}
            choices[part["index"]] = {"index": part["index"], "message": message, "logprobs": None}
            continue
        choice = choices[part["index"]]
        assert delta.keys() == {"content"} and choice.get("finish_reason") is None
        choice["message"]["content"] += delta["content"]
        choice["finish_reason"], choice["stop_reason"] = part["finish_reason"], part["stop_reason"]
        if part["logprobs"] is not None:
            before = choice["logprobs"] or {"content": []}
            choice["logprobs"] = {"content": before["content"] + part["logprobs"]["content"]}
        if "token_ids" in part:
            choice["token_ids"] = choice.get("token_ids", []) + part["token_ids"]
    return [choices[index] for index in sorted(choices)]


async def both(router: Router, script: Script, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole answer, and the chunks of the streamed one, which must say the same."""
    router.core.script = script
    whole = (await router.converse(**fields)).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events((await router.converse(**fields, **options)).content)
    assert assembled(chunks) == whole["choices"]
    assert (chunks[-1]["usage"], chunks[-1]["triptych"]) == (whole["usage"], whole["triptych"])
    assert all("triptych" not in chunk for chunk in chunks[:-1])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1 and chunks[0]["id"].startswith("chatcmpl-")
    assert router.edge.in_flight == 0 and router.core.cancels == []
    return whole, chunks


# -- whole -------------------------------------------------------------------------------------------------------------
async def test_a_whole_answer_is_a_chat_completion() -> None:
    router = chat_router()
    router.core.script = answers([5], [6], ending=LENGTH)
    answer = await router.converse(model="tiny", max_tokens=2)
    assert answer.status_code == 200
    value = answer.json()
    assert value.pop("triptych")["prefill_worker"] == "p1"
    assert value == {
        "id": "chatcmpl-id1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": " 5 6", "refusal": None, "tool_calls": []},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }
    assert router.core.submits[0].token_ids == tuple(b"hello")


# -- the order of chunks -----------------------------------------------------------------------------------------------
async def test_nothing_is_sent_before_the_first_token_and_then_the_role_comes_first() -> None:
    router = chat_router()
    call = Call(router.app, chat_body(), path=CHAT)
    await turns()
    assert call.sent == []
    router.core.tokens(1, 5)
    await turns()
    pieces = [event for event in call.body.split(b"\n\n") if event]
    assert [b'"role":"assistant"' in piece for piece in pieces] == [True, False]
    router.core.tokens(1, 6, finish=LENGTH)
    await call.task
    chunks = events(call.body)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": " 5"},
        {"content": " 6"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert "triptych" in chunks[-1] and all(chunk["usage"] is None for chunk in chunks)


async def test_every_choice_says_who_speaks_before_any_says_more() -> None:
    script = says((1, [7], None), (0, [5], None), (1, [8], LENGTH), (0, [6], STOP))
    _, chunks = await both(chat_router(), script, n=2)
    order = [(chunk["choices"][0]["index"], "role" in chunk["choices"][0]["delta"]) for chunk in chunks[:-1]]
    assert order == [(0, True), (1, True), (1, False), (0, False), (1, False), (0, False)]


async def test_an_answer_of_one_step_has_all_its_chunks() -> None:
    _, chunks = await both(chat_router(), says((0, [5], LENGTH)))
    assert [chunk["choices"] and chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": " 5"},
        [],
    ]


async def test_continuous_usage_begins_with_no_tokens() -> None:
    router = chat_router()
    router.core.script = answers([5], [6])
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events((await router.converse(stream=True, stream_options=options)).content)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 2, 2]
    assert chunks[-1]["choices"] == []


async def test_a_plain_chunk_says_what_the_last_one_says() -> None:
    _, chunks = await both(chat_router(), says((0, [5], None), (0, [6], LENGTH)))
    plain, final = chunks[1], chunks[2]
    assert plain.keys() == final.keys() and plain["choices"][0].keys() == final["choices"][0].keys()


# -- endings -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_keeps_its_status(stream: bool) -> None:
    router = chat_router()
    router.core.script = answers(ending=Unavailable("no decode worker"))
    answer = await router.converse(stream=stream)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["type"] == "ServiceUnavailableError"


async def test_a_failure_in_mid_stream_is_an_error_event_and_then_done() -> None:
    router = chat_router()
    router.core.script = answers([5], ending=Unavailable("no decode worker"))
    *chunks, error = events((await router.converse(stream=True)).content)
    assert [choice["message"]["content"] for choice in assembled(chunks)] == [" 5"]
    assert error == {
        "error": {"message": "no decode worker", "type": "ServiceUnavailableError", "param": None, "code": 503}
    }


async def test_a_client_that_leaves_cancels() -> None:
    router = chat_router()
    call = Call(router.app, chat_body(), path=CHAT)
    await turns()
    router.core.tokens(1, 5)
    await turns()
    call.disconnect()
    await call.task
    await turns()
    assert router.core.cancels == [Cancel(1)] and router.edge.in_flight == 0


async def test_a_stop_string_is_the_reason_and_not_in_the_text() -> None:
    script = says((0, [5], None), (0, [6], None), (0, [7], LENGTH))
    whole, _ = await both(chat_router(), script, stop=[" 6"])
    choice = whole["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (" 5", "stop", " 6")


# -- what is said beside the text --------------------------------------------------------------------------------------
FIVE = score(-0.5, (5, -0.5), (9, -1.5))
SIX = score(float("-inf"), (9, -0.25))


def scores(*steps: tuple[Sequence[int], Sequence[TokenLogprobs]], prompt: Sequence[TokenLogprobs] = ()) -> Script:
    """The prompt's scores one by one, then tokens with theirs; the last step ends the answer."""

    def script(core: FakeCore, key: int) -> None:
        finishes = [None] * (len(steps) - 1) + [LENGTH]
        in_turns(
            [partial(core.scored, key, start, one) for start, one in enumerate(prompt, start=1)]
            + [
                partial(core.tokens, key, *ids, finish=finish, logprobs=logprobs)
                for (ids, logprobs), finish in zip(steps, finishes, strict=True)
            ]
        )

    return script


def entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


async def test_logprobs_are_one_entry_per_token() -> None:
    whole, _ = await both(chat_router(), scores(([5], [FIVE]), ([6], [SIX])), logprobs=True, top_logprobs=1)
    assert whole["choices"][0]["logprobs"] == {
        "content": [
            entry(" 5", -0.5) | {"top_logprobs": [entry(" 5", -0.5)]},
            entry(" 6", -9999.0) | {"top_logprobs": [entry(" 9", -0.25)]},
        ]
    }


async def test_no_alternatives_is_not_no_logprobs() -> None:
    whole, _ = await both(chat_router(), scores(([5], [FIVE])), logprobs=True)
    assert whole["choices"][0]["logprobs"]["content"] == [entry(" 5", -0.5) | {"top_logprobs": []}]


async def test_tokens_can_be_named_by_their_ids_and_keep_their_bytes() -> None:
    fields = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    whole, _ = await both(chat_router(), scores(([5], [FIVE])), **fields)
    named = entry(" 5", -0.5) | {"token": "token_id:5"}
    assert whole["choices"][0]["logprobs"]["content"] == [named | {"top_logprobs": [named]}]


async def test_all_tokens_bytes_together_are_the_texts(tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    router = chat_router(vocabulary=TokenizerVocabulary.from_model_dir(tmp_path, CARD.vocab_size))
    ids = router.edge.vocabulary.encode("a😀b")
    whole, _ = await both(router, scores(*(([id], [score(-1.0)]) for id in ids)), logprobs=True)
    choice = whole["choices"][0]
    assert choice["message"]["content"] == "a😀b"
    assert b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"]) == "a😀b".encode()


async def test_an_echo_is_the_last_message_and_comes_after_every_role() -> None:
    messages = [{"role": "assistant", "content": "hello"}]  # nobody else's words are continued
    script = says((1, [6], LENGTH), (0, [5], LENGTH))
    whole, chunks = await both(chat_router(), script, n=2, echo=True, messages=messages)
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["hello 5", "hello 6"]
    said = [chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1]]
    assert said == ["", "", "hello", "hello", " 6", " 5"]


async def test_token_ids_stand_beside_the_choices_and_in_them() -> None:
    whole, chunks = await both(chat_router(), says((0, [5], None), (0, [6, 999], STOP)), return_token_ids=True)
    assert whole["prompt_token_ids"] == list(b"hello") and whole["choices"][0]["token_ids"] == [5, 6, 999]
    assert ["prompt_token_ids" in chunk for chunk in chunks] == [True, False, False, False]


async def test_prompt_logprobs_stand_beside_the_choices() -> None:
    router = chat_router()
    router.core.script = scores(([7], []), prompt=[score(-0.5)] * 4)
    whole = (await router.converse(prompt_logprobs=0)).json()
    first, *others = whole["prompt_logprobs"]
    assert first is None and [list(one) for one in others] == [[str(byte)] for byte in b"ello"]
    assert whole["choices"][0]["logprobs"] is None


@settings(max_examples=30)
@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 3), max_size=4)), max_size=8),
    stop=st.lists(st.text(alphabet=" 123", min_size=1, max_size=4), max_size=2),
)
async def test_any_tokens_cut_anyhow_are_the_same_whole_and_streamed(
    steps: list[tuple[int, list[int]]], stop: list[str]
) -> None:
    script = says(*((choice, ids, None) for choice, ids in steps), *((choice, [4], LENGTH) for choice in range(3)))
    await both(chat_router(), script, n=3, stop=stop)
