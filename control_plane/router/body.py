"""From a request's bytes to its fields, at a cost that the limits bound: memory while it arrives, time to decode it.

JSON turns a few bytes into many objects: four megabytes of `[],` are a million lists and half a second of the event
loop. So a body is first only measured (its values stay undecoded), and what is decoded is small: everything beside the
prompt together, and a prompt in one of the shapes that are served.

What does not belong here: what the fields mean (`validation`), and HTTP (`http`).
"""

import re
from collections.abc import Set
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
    "prompt_shape": "prompt: must be one string or one list of token ids; several prompts are not served yet",
    "prompt_tokens": f"prompt: at most {limits.PROMPT_TOKENS_MAX} tokens",
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
class _PromptOnly(msgspec.Struct):
    """Decoding to this walks over every other field without making anything of it."""

    prompt: msgspec.Raw = msgspec.Raw()


def decode_body_untrusted(body: bytes, known: Set[str]) -> dict[str, Any]:
    """The known fields as values. An unknown one has its name and None: nobody looks at what it holds."""
    raw_fields = _raw_fields_untrusted(body)
    fields: dict[str, Any] = dict.fromkeys(raw_fields)
    for name in raw_fields.keys() & known:
        decode = _decode_prompt_untrusted if name == "prompt" else _decode_untrusted
        fields[name] = decode(bytes(raw_fields[name]))
    return fields


def _raw_fields_untrusted(body: bytes) -> dict[str, msgspec.Raw]:
    """Names and undecoded values. Names are objects too, so their number is bounded before any is made."""
    if len(body) > limits.BODY_BESIDE_PROMPT_BYTES_MAX:
        prompt_bytes = len(bytes(_decode_untrusted(body, _PromptOnly).prompt))
        if len(body) - prompt_bytes > limits.BODY_BESIDE_PROMPT_BYTES_MAX:
            raise FrameError("json_beside_prompt")
    fields: dict[str, msgspec.Raw] = _decode_untrusted(body, dict[str, msgspec.Raw], "json_not_object")
    if len(fields) > limits.BODY_FIELDS_MAX:
        raise FrameError("json_fields")
    return fields


_LIST_OF: Final = re.compile(rb'\[[ \t\r\n]*(["\[]?)')


def _decode_prompt_untrusted(raw: bytes) -> str | list[int] | None:
    """A string or token ids, either also as the only element of a list: the two shapes of OpenAI's batch form."""
    if raw == b"null":
        return None
    if raw.startswith(b'"'):
        return str(_decode_untrusted(raw, str))
    opening = _LIST_OF.match(raw)
    if opening is None:
        raise FrameError("prompt_shape")
    if opening[1] == b'"':
        return str(_decode_untrusted(raw, tuple[str], "prompt_shape")[0])
    if raw.count(b",") >= limits.PROMPT_TOKENS_MAX:  # ids hold no commas: as many ids, one more
        raise FrameError("prompt_tokens")
    if opening[1] == b"[":
        return list(_decode_untrusted(raw, tuple[list[int]], "prompt_shape")[0])
    return list(_decode_untrusted(raw, list[int], "prompt_shape"))


def _decode_untrusted(raw: bytes, wanted: Any = Any, misfit: str = "json_syntax") -> Any:
    """Depth is bounded by the decoder's own recursion check. `misfit`: the reason when it is JSON of another type."""
    try:
        return msgspec.json.decode(raw, type=wanted)
    except RecursionError:
        raise FrameError("json_depth") from None
    except msgspec.ValidationError:
        raise FrameError(misfit) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise FrameError("json_syntax") from None
