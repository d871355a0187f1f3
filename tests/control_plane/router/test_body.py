"""Bodies are decoded to what is served, refused for one of a few reasons, and counted while they are held."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.router import body
from control_plane.router.body import BodyMemory, BodyTooLarge, decode_body_untrusted
from engine.base import limits
from engine.base.errors import FrameError, ResourceExhausted

KNOWN = frozenset(("prompt", "model", "stop"))


def decode(text: bytes) -> dict[str, Any]:
    return decode_body_untrusted(text, KNOWN)


def reason(text: bytes) -> str:
    with pytest.raises(FrameError) as raised:
        decode(text)
    return raised.value.reason


@pytest.mark.parametrize(
    ("prompt", "value"),
    [
        (b'"a"', "a"),
        (b'["a"]', "a"),
        (b'[ \n\t"a" ]', "a"),
        (b"[1, 2]", [1, 2]),
        (b"[[1,2]]", [1, 2]),
        (b"[ [ 1 , 2 ] ]", [1, 2]),
        (b"[]", []),
        (b"[[]]", []),
        (b"null", None),
    ],
)
def test_a_prompt_in_each_of_its_shapes(prompt: bytes, value: object) -> None:
    assert decode(b'{"prompt": ' + prompt + b"}") == {"prompt": value}


@pytest.mark.parametrize(
    "prompt",
    [b"7", b"true", b"{}", b'["a","b"]', b"[[1],[2]]", b'["a",1]', b'[1,"a"]', b"[1.5]", b"[[[1]]]", b"[null]"],
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


def test_a_prompt_of_too_many_ids_is_refused_undecoded() -> None:
    ids = b",".join([b"1"] * limits.PROMPT_TOKENS_MAX)
    assert len(decode(b'{"prompt":[%s]}' % ids)["prompt"]) == limits.PROMPT_TOKENS_MAX
    assert len(decode(b'{"prompt":[[%s]]}' % ids)["prompt"]) == limits.PROMPT_TOKENS_MAX
    assert reason(b'{"prompt":[%s,1]}' % ids) == "prompt_tokens"
    assert reason(b'{"prompt":[%s]}' % b",".join([b"[]"] * 1_000_000)) == "prompt_tokens"


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_raise_the_one_error(text: bytes) -> None:
    try:
        assert isinstance(decode(text), dict)
    except FrameError as error:
        assert error.reason in body.ERRORS


def test_every_reason_names_its_field_first() -> None:
    assert {message.partition(":")[0] for message in body.ERRORS.values()} == {"body", "prompt"}


def test_held_bytes_are_counted_and_given_back() -> None:
    memory = BodyMemory(10)
    with memory.hold(8) as first:
        first.append(b"abc")
        first.append(b"def")
        with memory.hold(8) as second, pytest.raises(ResourceExhausted):
            second.append(b"abcd")
            second.append(b"e")
        assert memory.held_bytes == 6 and first.whole() == b"abcdef"
        with pytest.raises(BodyTooLarge):
            first.append(b"ghi")
        assert memory.held_bytes == 6
    assert memory.held_bytes == 0
