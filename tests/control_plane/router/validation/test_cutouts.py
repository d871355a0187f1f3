"""Images leave a body as it arrives, however it is cut into parts; everything else reads as if nothing had been."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.router.validation import body
from control_plane.router.validation.body import BodyMemory, BodyShape, BodyTooLarge, Undecoded, decode_body_untrusted
from control_plane.router.validation.cutouts import CUT_BYTES_MIN, MARK, Body, Cutout, Sieve
from engine.base import limits
from engine.base.errors import FrameError

SHAPE = BodyShape({"prompt", "model", "stop", "messages", "tokens"}, {"prompt", "messages", "tokens"})
LONG = "data:image/png;base64," + "A/b+" * (CUT_BYTES_MIN // 4)
SHORT = "data:image/png;base64,AAAA"


def sieved(*parts: bytes) -> Body:
    sieve = Sieve()
    for part in parts:
        sieve.feed(part)
    return sieve.whole()


def decode(whole: Body | bytes) -> dict[str, Any]:
    fields = decode_body_untrusted(whole, SHAPE)
    return {name: value.decode_untrusted() if isinstance(value, Undecoded) else value for name, value in fields.items()}


def outcome(whole: Body | bytes) -> Any:
    """What is read, images as the texts that they came as; or why nothing is."""
    try:
        return plain(decode(whole))
    except FrameError as error:
        return error.reason


def plain(value: Any) -> Any:
    match value:
        case Cutout():
            return msgspec.json.decode(value.quoted())
        case dict():
            return {name: plain(item) for name, item in value.items()}
        case list():
            return [plain(item) for item in value]
    return value


def talk(*parts: Any, **fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}], **fields}).encode()


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def test_a_long_data_url_is_cut_out_and_a_short_one_is_not() -> None:
    text = talk(image(LONG), {"type": "input_image", "image_url": LONG}, image(SHORT))
    whole = sieved(text)
    assert len(whole.json) < len(text) - 2 * len(LONG) + 20
    assert [item.size_bytes for item in whole.cutouts.items] == [len(LONG)] * 2
    content = decode(whole)["messages"][0]["content"]
    assert [type(part["image_url"]) for part in content] == [dict, Cutout, dict]
    assert plain(content) == json.loads(text)["messages"][0]["content"]


@pytest.mark.parametrize("size", [1, 2, 5, 7, 64, 4_095])
def test_parts_may_end_anywhere(size: int) -> None:
    text = talk(
        "a", image(LONG), '"data:', '"' + LONG, '\\"' + LONG, image(SHORT), image(LONG.replace("A", "B")), name="\\"
    )
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    assert sieved(*parts).json == sieved(text).json
    assert outcome(sieved(*parts)) == outcome(text)


PIECES = ['"', "\\", '"data:', LONG, "data:", '"data:x"', '\\"data:', "}", ",", ":", "[", "é", MARK + "0", f'"{MARK}0"']


@given(st.lists(st.sampled_from(PIECES), max_size=12), st.integers(1, 9_000))
def test_whatever_a_string_holds_it_is_read_as_without_a_sieve(pieces: list[str], size: int) -> None:
    """Inside a string, and as raw JSON, good or bad."""
    inside = talk({"type": "text", "text": "".join(pieces)}, image(LONG), stop=["".join(pieces)[:200]])
    raw = f'{{"messages":[{{"role":"user","content":[{"".join(pieces)}]}}],"stop":"{LONG}"}}'.encode()
    for text in (inside, raw):
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        whole = sieved(*parts)
        if MARK not in "".join(pieces):
            assert outcome(whole) == outcome(text)


def test_text_that_begins_like_an_image_is_text() -> None:
    for fields in (
        {"messages": [{"role": "user", "content": LONG}]},
        {"messages": [{"role": "user", "content": [LONG, {"type": "text", "text": LONG}], "name": LONG}]},
        {"prompt": LONG},
        {"prompt": [LONG, "a"]},
        {"stop": [LONG], "model": LONG},
    ):
        text = json.dumps(fields).encode()
        whole = sieved(text)
        assert whole.cutouts.items
        assert decode(whole) == decode(text)


def test_what_is_beside_the_messages_has_its_limit() -> None:
    much = LONG + "A" * limits.BODY_BESIDE_PROMPT_BYTES_MAX
    for fields in ({"stop": much}, {"unknown": much}, {much: 1}):
        text = json.dumps({"messages": [], **fields}).encode()
        assert outcome(sieved(text)) == outcome(text) == "json_beside_prompt"
    assert decode(sieved(talk(image(much))))


def test_a_reference_of_ones_own_is_an_image_of_ones_own_or_text() -> None:
    content = decode(sieved(talk(image(LONG), image(f"{MARK}0"), image(f"{MARK}7"), f"{MARK}07x")))["messages"][0][
        "content"
    ]
    assert plain([part["image_url"]["url"] for part in content[:3]]) == [LONG, LONG, f"{MARK}7"]
    assert content[3] == f"{MARK}07x"


def test_a_body_of_openings_or_escapes_is_no_work() -> None:
    for text in (b'"data:' * 10_000, b'"data:' + b'\\"' * 10_000, b"\\" * 10_000 + b'"data:' + b"a" * 10_000):
        whole = sieved(*[text[at : at + 100] for at in range(0, len(text), 100)])
        assert (whole.json == text and whole.cutouts.items == ()) or not whole.cutouts.items


def test_images_have_a_limit_and_the_rest_has_its_own() -> None:
    memory = BodyMemory(1 << 20)
    with memory.hold(50_000, json_bytes_max=10_000) as held:
        held.append(b'{"a":"data:' + b"A" * 40_000)
        assert memory.held_bytes > 40_000
        with pytest.raises(BodyTooLarge, match="at most 50000 bytes"):
            held.append(b"A" * 10_000)
    with memory.hold(50_000, json_bytes_max=10_000) as held, pytest.raises(BodyTooLarge, match="beside its images"):
        held.append(b'{"a":"' + b"A" * 10_000)
    with memory.hold(50_000, json_bytes_max=10_000) as held:
        held.append(b'{"a":"data:' + b"A" * 40_000)
        held.append(b'"}')
        whole = held.whole()
        assert len(whole.json) < 40 and whole.cutouts.size_bytes == 40_005
    assert memory.held_bytes == 0


def test_too_long_a_text_is_not_put_back() -> None:
    text = json.dumps({"messages": [{"role": "user", "content": "data:" + "A" * limits.BODY_BYTES_MAX}]}).encode()
    assert outcome(sieved(text)) == "text_too_long"
    assert body.ERRORS["text_too_long"].startswith("messages: ")


def test_a_client_cannot_have_one_cutout_put_back_many_times() -> None:
    """A few kilobytes of references to one long string would be gigabytes."""
    long = "data:" + "A" * limits.BODY_BESIDE_PROMPT_BYTES_MAX
    own, message = f"{MARK}0", {"role": "user", "content": long}
    count = limits.BODY_BYTES_MAX // len(long)

    def read(**fields: Any) -> Any:
        return outcome(sieved(json.dumps(fields, ensure_ascii=False).encode()))

    assert read(messages=[message], stop=[own] * 1_000) == "json_beside_prompt"
    assert read(messages=[message], model=own) == "json_beside_prompt"
    assert read(messages=[message, *[{"role": "user", "content": own}] * count]) == "text_too_long"
    assert read(messages=[{"role": "user", "content": [long, *[own] * count]}]) == "text_too_long"
    assert read(prompt=[long, own, own]) == {"prompt": [long, own, own]}
    assert read(prompt="data:" + "A" * limits.BODY_BYTES_MAX) == "prompt_tokens"


def test_a_name_may_be_spelt_in_escapes() -> None:
    text = talk(image(SHORT)).replace(b'"image_url":', rb'"image\u005furl":')
    assert decode(text)["messages"][0]["content"] == [image(SHORT)]
