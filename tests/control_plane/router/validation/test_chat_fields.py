"""A chat request is a conversation and the words of completions, or is refused by the place of what is wrong."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.router.text.chat_template import ChatTemplate
from control_plane.router.text.vocabulary import OracleVocabulary
from control_plane.router.validation import chat_fields
from control_plane.router.validation import validator as validation
from control_plane.router.validation.chat_fields import Conversation
from control_plane.router.validation.validator import CHAT, ValidatedRequest, Validator
from engine.base import limits
from engine.base.errors import InvalidArgument, NotFound, ResourceExhausted
from engine.types import Constraint, ConstraintKind, SamplingParams
from tests.control_plane.router.edge_fakes import CARD

SOURCE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.name or '' }}:{{ m.content }};{% endfor %}"
    "{{ 'a:' if add_generation_prompt }}{{ mood }}{{ reasoning_effort }}"
)
USER = {"role": "user", "content": "hi"}


def make_validator(config: validation.Config | None = None, **changed: Any) -> Validator:
    arguments: dict[str, Any] = {
        "card": CARD,
        "vocabulary": OracleVocabulary(CARD.vocab_size),
        "draw_seed": lambda: 1,
        "count_unknown": lambda count: None,
        "check_constraint": lambda constraint: None,
        "clock_us": lambda: 0,
        "chat": ChatTemplate(SOURCE),
    }
    return Validator(config or validation.Config(), **{**arguments, **changed})


async def chat(validator: Validator | None = None, **fields: Any) -> ValidatedRequest:
    return await (validator or make_validator()).chat(json.dumps({"messages": [USER], **fields}).encode())


def text_of(request: ValidatedRequest) -> str:
    return bytes(request.token_ids).decode()


# -- what is refused ---------------------------------------------------------------------------------------------------
def bad(name: str, *values: Any) -> Iterator[tuple[dict[str, Any], str]]:
    return (({name: value}, name) for value in values)


def bad_message(field: str, *messages: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The second of two messages."""
    return (({"messages": [USER, message]}, f"messages[1]{field}") for message in messages)


PARTS_TOO_MANY = [{"type": "text", "text": ""}] * 129
BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    *bad("messages", None, [], "hi", 7, {}, [7], ["hi"], [[]], [{}], [{"content": "a"}], [USER] * 1_025),
    *bad("messages", [{"role": 7, "content": "a"}], [{"role": "user", "content": 7}], [{**USER, "name": 7}]),
    *bad("messages", [{"role": "user", "content": PARTS_TOO_MANY}], [{"role": "user", "content": [7]}]),
    *bad("messages", [{"role": "user", "content": "x" * 100}], [{"role": "user", "content": "x" * 1_000_000}]),
    *bad_message(".role", {"role": "robot", "content": "a"}, {"role": "", "content": "a"}),
    *bad_message(".content", {"role": "user"}, {"role": "system", "content": None}),
    *bad_message(".tool_calls", {"role": "assistant", "tool_calls": [{"id": "1"}]}),
    *bad_message(".name", {**USER, "name": "x" * 65}),
    *bad_message(".tool_call_id", {"role": "tool", "content": "a", "tool_call_id": "x" * 65}),
    *(
        ({"messages": [USER, {"role": "user", "content": ["a", {"type": kind, kind: {}}]}]}, "messages[1].content[1]")
        for kind in ("image_url", "video_url", "input_audio", "file", "", "no_such_type")
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    *bad("max_tokens", -1, 1.0, "16", True, 64, 1 << 40),
    *bad("max_completion_tokens", -1, 1.0, "16", True, 64),
    *bad("logprobs", 1, 0, "true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    *bad("add_generation_prompt", 1, "yes"),
    *bad("continue_final_message", 1, "yes"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    *bad("chat_template_kwargs", 7, [], {"a": []}, {"a": {}}, {"a": "x" * 1_025}, {"1a": 1}, {"a b": 1}, {"_a": 1}),
    *bad("chat_template_kwargs", {"messages": "x"}, {"tools": 1}, {"bos_token": "x"}, {"raise_exception": 1}),
    *bad("chat_template_kwargs", {"x" * 65: 1}, {f"a{index}": 1 for index in range(33)}, {"add_generation_prompt": 1}),
    *bad("reasoning_effort", 7, "x" * 65),
    *bad("chat_template", "{{ 1 }}", ""),
    *bad("chat_template_content_format", "openai"),
    *bad("tools", [{"type": "function"}]),
    *bad("tool_choice", "required", {"type": "function"}),
    *bad("function_call", {"name": "f"}),
    *bad("documents", [{}]),
    *bad("modalities", ["audio"]),
    *bad("audio", {"voice": "x"}),
    *bad("mm_processor_kwargs", {"a": 1}),
    *bad("echo", 1, "yes"),
    *bad("n", 0, 17),
    *bad("temperature", -1, "hot"),
    *bad("response_format", {"type": "xml"}),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHATS, ids=lambda value: str(value)[:60])
async def test_bad_chats_are_refused_by_place(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await chat(**fields)
    assert raised.value.field == param
    assert raised.value.message.startswith(param) and len(raised.value.message) < 300


async def test_a_type_that_nobody_knows_is_not_repeated() -> None:
    with pytest.raises(InvalidArgument) as raised:
        await chat(messages=[{"role": "user", "content": [{"type": "sec\nret"}]}])
    assert raised.value.message == (
        "messages[0].content[0]: this type of part is not served; accepted types: text, input_text, output_text"
    )


async def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(InvalidArgument, match="messages: the served model has no chat template"):
        await chat(make_validator(chat=None))


async def test_the_model_is_checked_here_too() -> None:
    with pytest.raises(NotFound):
        await chat(model="other")


async def test_a_conversation_is_bounded_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHAT_CHARACTERS_MAX", 10)
    chat_fields.read_conversation({"messages": [{"role": "user", "content": "x" * 5}] * 2})
    with pytest.raises(InvalidArgument, match="messages: at most 10 characters together"):
        chat_fields.read_conversation({"messages": [{"role": "user", "content": "x" * 5}] * 2 + [USER]})


# -- what is served ----------------------------------------------------------------------------------------------------
CONTENTS: list[tuple[Any, str]] = [
    ("a", "a"),
    ("", ""),
    ([], ""),
    ([{"type": "text", "text": "a"}], "a"),
    ([{"type": "text", "text": "a"}, {"type": "input_text", "text": ""}, "b"], "a\n\nb"),
]


@pytest.mark.parametrize(("content", "text"), CONTENTS)
async def test_content_is_text_or_parts_of_text(content: Any, text: str) -> None:
    assert text_of(await chat(messages=[{"role": "user", "content": content}])) == f"u:{text};a:"


async def test_every_role_may_speak_and_assistants_may_be_silent() -> None:
    messages = [
        {"role": "system", "content": "b"},
        {"role": "developer", "content": "c", "name": "N"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "d", "tool_call_id": "1", "unknown": [{}]},
    ]
    assert text_of(await chat(messages=messages)) == "s:b;dN:c;a:;t:d;a:"


async def test_variables_reach_the_template() -> None:
    fields: dict[str, Any] = {"chat_template_kwargs": {"mood": "glad"}, "reasoning_effort": "low"}
    assert text_of(await chat(**fields)) == "u:hi;a:gladlow"
    assert text_of(await chat(add_generation_prompt=False)) == "u:hi;"
    assert text_of(await chat(continue_final_message=True)) == "u:hi"


async def test_the_same_fields_mean_the_same_as_in_completions() -> None:
    validator = make_validator()
    fields = {
        "temperature": 0.5,
        "stop": ["x"],
        "n": 2,
        "seed": 3,
        "max_tokens": 4,
        "stream": True,
        "priority": 1,
        "stream_options": {"include_usage": True},
        "cache_salt": "s",
        "response_format": {"type": "json_object"},
        "triptych": {"codec": "raw"},
        "return_token_ids": True,
        "ignore_eos": True,
        "bad_words": ["a"],
    }
    talk = await chat(validator, **fields)
    complete = await validator.validate({"prompt": list(talk.token_ids), **fields})
    assert talk == replace(complete, chat=True)
    assert talk.sampling.constraint == Constraint(ConstraintKind.JSON_OBJECT)
    validator.close()


async def test_fields_over_another_wire_are_the_same_chat() -> None:
    validator = make_validator()
    messages = [{"role": "user", "content": ["a", {"type": "text", "text": "b"}]}]
    assert await validator.validate({"messages": messages, "max_tokens": 3}) == await chat(
        validator, messages=messages, max_tokens=3
    )


async def test_null_means_the_default_everywhere() -> None:
    names = CHAT.shape.known - {"messages"}
    request = await chat(**dict.fromkeys(names))
    assert request == await chat()
    assert request == ValidatedRequest(
        token_ids=tuple(b"u:hi;a:"), sampling=SamplingParams(seed=1, max_tokens=64 - 7), chat=True
    )


async def test_neutral_values_are_accepted() -> None:
    for name, values in CHAT.not_served.items():
        for value in values:
            assert await chat(**{name: value}) == await chat()


# -- how long an answer may be -----------------------------------------------------------------------------------------
async def test_an_answer_has_all_the_room_unless_told_otherwise() -> None:
    async def length(**fields: Any) -> int:
        return (await chat(**fields)).sampling.max_tokens

    assert await length() == 64 - 7
    assert await length(max_tokens=5) == 5
    assert await length(max_completion_tokens=6) == 6
    assert await length(max_tokens=5, max_completion_tokens=6) == 6
    with pytest.raises(InvalidArgument, match="max_completion_tokens together at most 64 tokens, got 7 \\+ 58"):
        await length(max_completion_tokens=58)


async def test_scores_shorten_an_answer_that_was_left_to_us() -> None:
    validator = make_validator(card=replace(CARD, max_model_len=131_000))

    async def length(**fields: Any) -> int:
        return (await chat(validator, **fields)).sampling.max_tokens

    assert await length() == 131_000 - 7
    assert await length(logprobs=True, top_logprobs=3) == limits.LOGPROBS_PER_ANSWER_MAX // 4
    assert await length(logprobs=True, top_logprobs=3, n=2) == limits.LOGPROBS_PER_ANSWER_MAX // 8
    assert await length(logprobs=True, top_logprobs=3, stream=True) == 131_000 - 7
    with pytest.raises(InvalidArgument, match="logprobs: at most 131072"):
        await length(logprobs=True, top_logprobs=3, max_tokens=40_000)


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 20}, 20)],
)
async def test_logprobs_are_a_switch_and_a_number(fields: dict[str, Any], logprobs: int | None) -> None:
    assert (await chat(**fields)).sampling.logprobs == logprobs
    echoing = await chat(**fields, echo=True)
    assert (echoing.sampling.logprobs, echoing.sampling.prompt_logprobs) == (logprobs, None)


async def test_echo_is_the_last_message_where_the_answer_goes_on_in_its_role() -> None:
    answer = {"role": "assistant", "content": "so"}
    assert (await chat(echo=True)).echo_text is None
    assert (await chat(messages=[USER, answer], echo=True)).echo_text == "so"
    assert (await chat(messages=[USER, answer])).echo_text is None
    assert (await chat(echo=True, continue_final_message=True)).echo_text == "hi"


# -- work --------------------------------------------------------------------------------------------------------------
async def test_long_conversations_leave_the_loop_and_so_do_many_messages() -> None:
    config = validation.Config(inline_characters_max=200, encodes_waiting_max=0)
    card = replace(CARD, max_model_len=10_000)
    assert await chat(make_validator(config, card=card))
    for messages in ([{"role": "user", "content": "x" * 300}], [USER] * 3):
        with pytest.raises(ResourceExhausted, match="too many long prompts at once"):
            await chat(make_validator(config, card=card), messages=messages)
    validator = make_validator(validation.Config(inline_characters_max=0), card=card)
    assert text_of(await chat(validator)) == "u:hi;a:"
    validator.close()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
message_like = st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls"]), anything)


@given(st.dictionaries(st.sampled_from(sorted(CHAT.shape.known)), anything, max_size=4), st.lists(message_like))
async def test_any_values_are_a_chat_or_are_refused(fields: dict[str, Any], messages: list[Any]) -> None:
    validator = make_validator()
    for spoken in ([USER], messages):
        try:
            request = await validator.validate({**fields, "messages": spoken})
        except InvalidArgument as error:
            assert error.field is not None
        else:
            assert 0 < len(request.token_ids) + request.sampling.max_tokens <= CARD.max_model_len
    validator.close()


def test_what_a_conversation_weighs() -> None:
    assert Conversation(messages=[USER, {**USER, "name": "me"}]).characters == 2 * len("userhi") + 2
    assert Conversation(messages=[USER], variables={"date": "x" * 9, "long": True}).characters == len("userhi") + 9


async def test_what_is_cheap_is_checked_before_what_may_be_large_is_looked_at() -> None:
    validator = make_validator()
    for wrong in ({"temperature": -1}, {"model": 7}, {"continue_final_message": 1}, {"max_tokens": -1}):
        with pytest.raises((InvalidArgument, NotFound)) as raised:
            await chat(validator, **wrong, messages=7)
        assert raised.value.field == next(iter(wrong))
    with pytest.raises(InvalidArgument, match="messages: must be a list"):
        await chat(validator, messages=7)
    with pytest.raises(InvalidArgument, match="temperature"):
        await validator.completion(b'{"prompt":{},"temperature":-1}')
    with pytest.raises(InvalidArgument, match="prompt: must be a string"):
        await validator.completion(b'{"prompt":{}}')
