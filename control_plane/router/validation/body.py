"""From a request's bytes to its fields, at a cost that the limits bound: memory while it arrives, time to decode it.

JSON turns a few bytes into many objects: four megabytes of `[],` are a million lists and half a second of the event
loop. So a body is first only measured (its values stay undecoded), and what is decoded is small: everything beside the
prompt together. What may be large (prompts, messages, ids to decode) is decoded only in a shape that is served, of
which no more than the first so many items are ever made.

What does not belong here: what the fields mean (`validation`), and HTTP (`http`).
"""

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from engine.base import limits
from engine.base.errors import FrameError, InvalidArgument, ResourceExhausted

ERRORS: Final = {
    "json_syntax": "body: must be one JSON value in UTF-8 (no NaN, no Infinity, no lone surrogates, 64-bit numbers)",
    "json_depth": "body: nested too deeply",
    "json_not_object": "body: must be a JSON object",
    "json_fields": f"body: at most {limits.BODY_FIELDS_MAX} fields",
    "json_beside_prompt": f"body: at most {limits.BODY_BESIDE_PROMPT_BYTES_MAX} bytes beside the prompt",
    "prompt_shape": "prompt: must be a string, a list of token ids, a list of strings, or a list of lists of token ids",
    "prompt_count": f"prompt: at most {limits.PROMPTS_MAX} prompts",
    "prompt_tokens": f"prompt: at most {limits.PROMPT_TOKENS_MAX} tokens",
    "messages_shape": "messages: must be a list of objects, each with a role (a string) and a content "
    '(a string, or a list of parts such as {"type": "text", "text": ...})',
    "messages_count": f"messages: at most {limits.MESSAGES_MAX} messages",
    "parts_count": f"messages: at most {limits.MESSAGE_PARTS_MAX} parts in one message, {limits.MESSAGES_MAX} together",
    "tokens_shape": "tokens: must be a list of token ids",
    "tokens_count": f"tokens: at most {limits.PROMPT_TOKENS_MAX} tokens",
}


class BodyTooLarge(InvalidArgument):
    """Refused while reading: no more than the limit is ever held."""


# -- memory ------------------------------------------------------------------------------------------------------------
class BodyMemory:
    """Counts the bytes of all bodies that are being read or checked. Admission of requests comes later, and too late
    for memory: a thousand clients may each send megabytes before the first of them is a request."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.held_bytes = 0

    def hold(self, body_bytes_max: int) -> "HeldBody":
        return HeldBody(self, body_bytes_max)

    def take(self, size_bytes: int) -> None:
        if self.held_bytes + size_bytes > self._bytes_max:
            raise ResourceExhausted("too many request bodies at once", retry_after_ms=limits.RETRY_AFTER_MS)
        self.held_bytes += size_bytes


class HeldBody:
    """One body as it arrives, by its own bytes: a length header is a claim. Leaving the block gives them back."""

    __slots__ = ("_bytes_max", "_memory", "_parts", "size_bytes")

    def __init__(self, memory: BodyMemory, bytes_max: int) -> None:
        self._memory = memory
        self._bytes_max = bytes_max
        self._parts: list[bytes] = []
        self.size_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.held_bytes -= self.size_bytes
        self._parts, self.size_bytes = [], 0

    def append(self, part: bytes) -> None:
        if self.size_bytes + len(part) > self._bytes_max:
            raise BodyTooLarge(f"body: at most {self._bytes_max} bytes", field="body")
        self._memory.take(len(part))
        self.size_bytes += len(part)
        self._parts.append(part)

    def whole(self) -> bytes:
        """For the one who decodes it; the parts are not kept beside it."""
        parts, self._parts = self._parts, []
        return b"".join(parts)


# -- decoding ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class BodyShape:
    """The fields of one endpoint: which are known, and which of those may be large (of `LARGE`)."""

    known: Set[str]
    large: Set[str]


def decode_body_untrusted(body: bytes, shape: BodyShape) -> dict[str, Any]:
    """The known fields as values. An unknown one has its name and None: nobody looks at what it holds."""
    raw_fields = _raw_fields_untrusted(body, shape.large)
    fields: dict[str, Any] = dict.fromkeys(raw_fields)
    for name in raw_fields.keys() & shape.known:
        decode = LARGE[name] if name in shape.large else _decode_untrusted
        fields[name] = decode(bytes(raw_fields[name]))
    return fields


class _LargeOnly(msgspec.Struct):
    """Decoding to this walks over every other field without making anything of it."""

    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    tokens: msgspec.Raw = msgspec.Raw()


_ANYTHING: Final = msgspec.json.Decoder()
_LARGE_ONLY: Final = msgspec.json.Decoder(_LargeOnly)
_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT: Final = msgspec.json.Decoder(str)
_IDS: Final = msgspec.json.Decoder(list[int])


def _raw_fields_untrusted(body: bytes, large: Set[str]) -> dict[str, msgspec.Raw]:
    """Names and undecoded values. Names are objects too, so their number is bounded before any is made."""
    if len(body) > limits.BODY_BESIDE_PROMPT_BYTES_MAX:
        measured = msgspec.structs.asdict(_decode_untrusted(body, _LARGE_ONLY, "json_not_object"))
        large_bytes = sum(memoryview(measured[name]).nbytes for name in large)
        if len(body) - large_bytes > limits.BODY_BESIDE_PROMPT_BYTES_MAX:
            raise FrameError("json_beside_prompt")
    fields: dict[str, msgspec.Raw] = _decode_untrusted(body, _FIELDS, "json_not_object")
    if len(fields) > limits.BODY_FIELDS_MAX:
        raise FrameError("json_fields")
    return fields


def _decode_untrusted(raw: bytes, decoder: "msgspec.json.Decoder[Any]" = _ANYTHING, misfit: str = "json_syntax") -> Any:
    """Depth is bounded by the decoder's own recursion check. `misfit`: the reason when it is JSON of another type."""
    try:
        return decoder.decode(raw)
    except RecursionError:
        raise FrameError("json_depth") from None
    except msgspec.ValidationError:
        raise FrameError(misfit) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise FrameError("json_syntax") from None


# -- lists of bounded length -------------------------------------------------------------------------------------------
def _first(count: int, item: Any) -> "msgspec.json.Decoder[Any]":
    """Makes no more than the first `count` items of a list: the decoder walks over the others, as over the
    unknown fields of an object. A length limit of msgspec's is looked at when all of them are there."""
    slots = [(f"item{index}", item | msgspec.UnsetType, msgspec.UNSET) for index in range(count)]
    return msgspec.json.Decoder(msgspec.defstruct("First", slots, array_like=True))


def _items_untrusted(raw: bytes, first: "msgspec.json.Decoder[Any]", misfit: str, too_many: str) -> list[Any]:
    """`first` makes one item more than there may be."""
    slots = msgspec.structs.astuple(_decode_untrusted(raw, first, misfit))
    if slots[-1] is not msgspec.UNSET:
        raise FrameError(too_many)
    return [item for item in slots if item is not msgspec.UNSET]


# -- prompts and lists of ids ------------------------------------------------------------------------------------------
_LIST_OF: Final = re.compile(rb'\[[ \t\r\n]*(["\[]?)')
_TEXTS: Final = _first(limits.PROMPTS_MAX + 1, str)
_LISTS_OF_IDS: Final = _first(limits.PROMPTS_MAX + 1, list[int])


def _decode_prompt_untrusted(raw: bytes) -> str | list[Any] | None:
    """A text, ids, a list of texts, or a list of lists of ids: OpenAI's four."""
    if raw == b"null":
        return None
    if raw.startswith(b'"'):
        return str(_decode_untrusted(raw, _TEXT))
    opening = _LIST_OF.match(raw)
    if opening is None:
        raise FrameError("prompt_shape")
    if opening[1] == b'"':
        return _items_untrusted(raw, _TEXTS, "prompt_shape", "prompt_count")
    _check_id_count(raw, "prompt_tokens")
    if opening[1] == b"[":
        return _items_untrusted(raw, _LISTS_OF_IDS, "prompt_shape", "prompt_count")
    return list(_decode_untrusted(raw, _IDS, "prompt_shape"))


def _decode_tokens_untrusted(raw: bytes) -> list[int] | None:
    if raw == b"null":
        return None
    _check_id_count(raw, "tokens_count")
    return list(_decode_untrusted(raw, _IDS, "tokens_shape"))


def _check_id_count(raw: bytes, reason: str) -> None:
    """Ids hold no commas: as many ids, one more."""
    if raw.count(b",") >= limits.PROMPT_TOKENS_MAX:
        raise FrameError(reason)


# -- messages ----------------------------------------------------------------------------------------------------------
class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class _Message(msgspec.Struct):
    role: str
    content: msgspec.Raw = msgspec.Raw()
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw()


_MESSAGES: Final = _first(limits.MESSAGES_MAX + 1, _Message)
_PARTS: Final = _first(limits.MESSAGE_PARTS_MAX + 1, str | _Part)
_FEW_PARTS: Final = msgspec.json.Decoder(list[str | _Part])


def _decode_messages_untrusted(raw: bytes) -> list[dict[str, Any]] | None:
    if raw == b"null":
        return None
    messages = _items_untrusted(raw, _MESSAGES, "messages_shape", "messages_count")
    parts_left = limits.MESSAGES_MAX
    decoded = []
    for message in messages:
        content = _content_untrusted(bytes(message.content))
        parts_left -= len(content) if isinstance(content, list) else 0
        if parts_left < 0:
            raise FrameError("parts_count")
        decoded.append(_as_dict(message, content))
    return decoded


def _content_untrusted(raw: bytes) -> str | list[Any] | None:
    if raw in (b"", b"null"):
        return None
    if not raw.startswith(b"["):
        return str(_decode_untrusted(raw, _TEXT, "messages_shape"))
    parts = _parts_untrusted(raw)
    return [part if isinstance(part, str) else {"type": part.type, "text": part.text} for part in parts]


def _parts_untrusted(raw: bytes) -> list[str | _Part]:
    """The shortest part is an empty string: three bytes, with its comma."""
    if len(raw) <= 3 * limits.MESSAGE_PARTS_MAX:  # a plain list is five times cheaper to make
        return list(_decode_untrusted(raw, _FEW_PARTS, "messages_shape"))
    return _items_untrusted(raw, _PARTS, "messages_shape", "parts_count")


def _as_dict(message: _Message, content: str | list[Any] | None) -> dict[str, Any]:
    """What tool calls hold is not looked at: that there are some is enough."""
    return {
        "role": message.role,
        "content": content,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "tool_calls": None if _NO_CALLS.fullmatch(bytes(message.tool_calls)) else True,
    }


_NO_CALLS: Final = re.compile(rb"(null|\[[ \t\r\n]*\])?")

LARGE: Final[Mapping[str, Callable[[bytes], Any]]] = {
    "prompt": _decode_prompt_untrusted,
    "messages": _decode_messages_untrusted,
    "tokens": _decode_tokens_untrusted,
}
