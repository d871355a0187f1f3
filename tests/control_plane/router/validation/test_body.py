"""Bodies are decoded to what is served, refused for one of a few reasons, and counted while they are held."""

import contextlib
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.router.validation import body
from control_plane.router.validation.body import BodyMemory, BodyShape, BodyTooLarge, Undecoded, decode_body_untrusted
from engine.base import limits
from engine.base.errors import FrameError, InvalidArgument, ResourceExhausted

SHAPE = BodyShape({"prompt", "model", "stop", "messages", "tokens"}, {"prompt", "messages", "tokens"})


def decode(text: bytes) -> dict[str, Any]:
    """All of it, the large values too."""
    fields = decode_body_untrusted(text, SHAPE)
    return {name: value.decode_untrusted() if isinstance(value, Undecoded) else value for name, value in fields.items()}


def reason(text: bytes) -> str:
    with pytest.raises(FrameError) as raised:
        decode(text)
    return raised.value.reason


@pytest.mark.parametrize(
    ("prompt", "value"),
    [
        (b'"a"', "a"),
        (b'["a"]', ["a"]),
        (b'[ \n\t"a" ]', ["a"]),
        (b'["a", "", "b"]', ["a", "", "b"]),
        (b"[1, 2]", [1, 2]),
        (b"[[1,2]]", [[1, 2]]),
        (b"[ [ 1 , 2 ] , [3]]", [[1, 2], [3]]),
        (b"[]", []),
        (b"[[]]", [[]]),
        (b"null", None),
    ],
)
def test_a_prompt_in_each_of_its_shapes(prompt: bytes, value: object) -> None:
    assert decode(b'{"prompt": ' + prompt + b"}") == {"prompt": value}


@pytest.mark.parametrize(
    "prompt",
    [
        b"7",
        b"true",
        b"{}",
        b'["a",[1]]',
        b'[[1],"a"]',
        b'["a",1]',
        b'[1,"a"]',
        b"[1.5]",
        b"[[[1]]]",
        b"[null]",
        b"[1,[2]]",
    ],
)
def test_no_other_shape_is_a_prompt(prompt: bytes) -> None:
    assert reason(b'{"prompt":' + prompt + b"}") == "prompt_shape"


def test_the_last_of_two_prompts_counts_as_everywhere_in_json() -> None:
    assert decode(b'{"prompt":"a","prompt":"b"}') == {"prompt": "b"}


def test_unknown_fields_have_their_names_only() -> None:
    assert decode(b'{"other":{"deep":[1]},"model":"m"}') == {"other": None, "model": "m"}


def test_numbers_of_fields_and_of_bytes_beside_the_prompt_have_a_limit() -> None:
    fields = {f"f{index}": 1 for index in range(limits.BODY_FIELDS_MAX)}
    assert len(decode(msgspec.json.encode(fields))) == limits.BODY_FIELDS_MAX
    assert reason(msgspec.json.encode(fields | {"one": 1})) == "json_fields"
    filler = b"y" * (limits.BODY_BESIDE_PROMPT_BYTES_MAX - len(b'{"x":"","prompt":}'))
    long_prompt = b'"%s"' % (b"p" * limits.BODY_BESIDE_PROMPT_BYTES_MAX)
    assert len(decode(b'{"x":"%s","prompt":%s}' % (filler, long_prompt))["prompt"]) == len(long_prompt) - 2
    assert reason(b'{"x":"%sy","prompt":%s}' % (filler, long_prompt)) == "json_beside_prompt"
    names = b",".join([b'"f%d":1' % index for index in range(limits.BODY_FIELDS_MAX)])
    assert reason(b'{"prompt":%s,%s}' % (long_prompt, names)) == "json_fields"
    assert decode(b'{"stop":%s,"prompt":%s,"y":1}' % (b'"s"', long_prompt)).keys() == {"stop", "prompt", "y"}


def test_a_prompt_of_too_many_ids_is_refused_undecoded() -> None:
    ids = b",".join([b"1"] * limits.PROMPT_TOKENS_MAX)
    assert len(decode(b'{"prompt":[%s]}' % ids)["prompt"]) == limits.PROMPT_TOKENS_MAX
    assert len(decode(b'{"prompt":[[%s]]}' % ids)["prompt"][0]) == limits.PROMPT_TOKENS_MAX
    assert reason(b'{"prompt":[%s,1]}' % ids) == "prompt_tokens"
    assert reason(b'{"prompt":[%s]}' % b",".join([b"[]"] * 1_000_000)) == "prompt_tokens"


def test_so_many_prompts_and_no_more() -> None:
    for one in (b'"a"', b"[1]"):
        most = b",".join([one] * limits.PROMPTS_MAX)
        assert len(decode(b'{"prompt":[%s]}' % most)["prompt"]) == limits.PROMPTS_MAX
        assert reason(b'{"prompt":[%s,%s]}' % (most, one)) == "prompt_count"


# -- messages and ids --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("message", "value"),
    [
        (b'{"role":"user","content":"a"}', {"role": "user", "content": "a"}),
        (b'{"role":"user"}', {"role": "user", "content": None}),
        (b'{"role":"user","content":null,"x":[[]]}', {"role": "user", "content": None}),
        (
            b'{"role":"user","content":["a",{"type":"text","text":"b","y":{}},{"type":"image_url","image_url":{}}]}',
            {
                "role": "user",
                "content": ["a", {"type": "text", "text": "b"}, {"type": "image_url", "image_url": False}],
            },
        ),
        (
            b'{"role":"a","name":"n","tool_calls":[ ]}',
            {"role": "a", "content": None, "name": "n", "tool_calls": False},
        ),
        (b'{"role":"a","tool_calls":null}', {"role": "a", "content": None, "tool_calls": False}),
        (b'{"role":"a","tool_calls":[{}]}', {"role": "a", "content": None, "tool_calls": True}),
    ],
)
def test_a_message_is_what_is_known_of_it(message: bytes, value: object) -> None:
    assert decode(b'{"messages":[%s]}' % message) == {"messages": [value]}


@pytest.mark.parametrize(
    "messages",
    [
        *(b"7", b'"a"', b"{}", b"[7]", b"[[]]", b'["a"]', b"[{}]", b'[{"role":7}]', b'[{"content":"a"}]'),
        *(b'[{"role":"user","content":7}]', b'[{"role":"user","content":{}}]', b'[{"role":"user","content":[7]}]'),
        *(b'[{"role":"user","content":[{}]}]', b'[{"role":"user","content":[{"type":7}]}]'),
        b'[{"role":"user","name":7}]',
    ],
)
def test_nothing_else_is_a_list_of_messages(messages: bytes) -> None:
    assert reason(b'{"messages":%s}' % messages) == "messages_shape"


def test_messages_and_their_parts_have_limits() -> None:
    def messages(count: int, content: bytes = b'"a"') -> bytes:
        return b'{"messages":[%s]}' % b",".join([b'{"role":"user","content":%s}' % content] * count)

    def parts(count: int) -> bytes:
        return b"[%s]" % b",".join([b'"a"'] * count)

    assert len(decode(messages(limits.MESSAGES_MAX))["messages"]) == limits.MESSAGES_MAX
    assert reason(messages(limits.MESSAGES_MAX + 1)) == "messages_count"
    assert decode(messages(8, parts(limits.MESSAGE_PARTS_MAX)))
    assert reason(messages(1, parts(limits.MESSAGE_PARTS_MAX + 1))) == "parts_count"
    assert reason(messages(9, parts(limits.MESSAGE_PARTS_MAX))) == "parts_count"
    assert reason(messages(limits.MESSAGES_MAX, b"[%s,%s]" % (parts(2)[1:-1], parts(2)[1:-1]))) == "parts_count"
    quoting = b'["%s"]' % (rb"\"" * 5_000)  # quotes inside a text are no parts
    assert decode(messages(3, quoting))["messages"][2]["content"] == ['"' * 5_000]
    assert reason(messages(1, b"[%s,%s]" % (quoting[1:-1], parts(limits.MESSAGE_PARTS_MAX)[1:-1]))) == "parts_count"


def test_messages_keep_their_contents() -> None:
    """Contents are decoded many at a time."""
    contents: list[Any] = [["one", {"type": "text", "text": str(index)}] if index % 3 else "x" for index in range(500)]
    contents[7] = contents[300] = None
    messages = [{"role": "user", "content": content} for content in contents]
    assert decode(msgspec.json.encode({"messages": messages})) == {"messages": messages}


def test_what_may_be_large_is_not_decoded_before_it_is_asked_for() -> None:
    fields = decode_body_untrusted(b'{"model":"m","prompt":[true],"messages":{},"tokens":null}', SHAPE)
    assert (fields["model"], fields["tokens"]) == ("m", None)
    assert isinstance(fields["prompt"], Undecoded) and isinstance(fields["messages"], Undecoded)
    with pytest.raises(InvalidArgument, match="prompt: must be a string") as raised:
        body.large_value(fields, "prompt")
    assert raised.value.field == "prompt"
    assert body.large_value({"prompt": "a"}, "prompt") == "a" and body.large_value({}, "prompt") is None


def test_names_are_bounded_however_many_colons_there_are() -> None:
    """With few colons a large body is walked over once; many may be many names, or no more than text."""
    long = b"x" * limits.BODY_BESIDE_PROMPT_BYTES_MAX
    colons = b":" * 5_000
    for text in (long, long + colons):
        assert decode(b'{"y":1,"prompt":"%s"}' % text) == {"y": None, "prompt": text.decode()}
        assert reason(b'{"prompt":"a","y":"%s"}' % text) == "json_beside_prompt"
    names = b",".join([b'"%d":0' % index for index in range(400_000)])
    tracemalloc.start()
    try:
        assert reason(b'{%s,"prompt":"%s"}' % (names, long)) == "json_beside_prompt"
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * len(names)  # the body itself and no names


def test_messages_may_be_long_and_what_is_beside_them_may_not() -> None:
    long = b"x" * (2 * limits.BODY_BESIDE_PROMPT_BYTES_MAX)
    assert decode(b'{"messages":[{"role":"user","content":"%s"}]}' % long)
    assert reason(b'{"messages":[],"stop":"%s"}' % long) == "json_beside_prompt"
    beside = BodyShape({"prompt", "messages"}, {"prompt"})
    with pytest.raises(FrameError, match="json_beside_prompt"):
        decode_body_untrusted(b'{"messages":"%s"}' % long, beside)


@pytest.mark.parametrize(
    "hostile",
    [
        b'{"prompt":[%s""]}' % (b'"",' * 1_000_000),
        b'{"prompt":[%s[]]}' % (b"[]," * 130_000),
        b'{"messages":[%s{}]}' % (b"{}," * 1_000_000),
        b'{"messages":[%s{"role":"a"}]}' % (b'{"role":"a"},' * 300_000),
        b'{"messages":[{"role":"a","content":[%s""]}]}' % (b'"",' * 1_000_000),
        b'{"messages":[{"role":"a","x":[%s0]}]}' % (b"[]," * 1_000_000),
        b'{"tokens":[%s0]}' % (b"0," * 1_000_000),
    ],
    ids=lambda body: body[:40].decode(),
)
def test_no_body_becomes_many_objects(hostile: bytes) -> None:
    """Of four megabytes, no more than the limits let through, and what their names say."""
    tracemalloc.start()
    try:
        with contextlib.suppress(FrameError):
            decode(hostile)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * len(hostile) + (256 << 10)  # copies of the text, and no list of its items


def test_ids_to_decode_are_a_list_of_integers() -> None:
    assert decode(b'{"tokens":[1, 2]}') == {"tokens": [1, 2]}
    assert decode(b'{"tokens":null}') == {"tokens": None}
    assert {reason(b'{"tokens":%s}' % value) for value in (b"7", b'"a"', b"[true]", b"[[1]]", b'["a"]')} == {
        "tokens_shape"
    }
    assert reason(b'{"tokens":[%s]}' % b",".join([b"1"] * (limits.PROMPT_TOKENS_MAX + 1))) == "tokens_count"


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_raise_the_one_error(text: bytes) -> None:
    try:
        assert isinstance(decode(text), dict)
    except FrameError as error:
        assert error.reason in body.ERRORS


def test_every_reason_names_its_field_first() -> None:
    assert {message.partition(":")[0] for message in body.ERRORS.values()} == {"body", "prompt", "messages", "tokens"}


def test_held_bytes_are_counted_and_given_back() -> None:
    memory = BodyMemory(10)
    with memory.hold(8) as first:
        first.append(b"abc")
        first.append(b"def")
        with memory.hold(8) as second, pytest.raises(ResourceExhausted):
            second.append(b"abcd")
            second.append(b"e")
        assert memory.held_bytes == 6 and first.whole().json == b"abcdef"
        with pytest.raises(BodyTooLarge):
            first.append(b"ghi")
        assert memory.held_bytes == 6
    assert memory.held_bytes == 0


def test_a_tenants_bodies_leave_room_for_anothers() -> None:
    memory = BodyMemory(100, tenants=2)
    with memory.hold(100, "red") as flood, memory.hold(100, "blue") as body:
        with pytest.raises(ResourceExhausted, match="too many request bodies at once"):
            for _ in range(100):
                flood.append(b"x")
        assert flood.size_bytes == 80
        body.append(b"y" * 10)
    assert memory.held_bytes == 0
