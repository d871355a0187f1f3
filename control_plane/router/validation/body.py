"""From a request's bytes to its fields, at a cost that the limits bound: memory while it arrives, time to decode it.

JSON turns a few bytes into many objects: four megabytes of `[],` are a million lists and half a second of the event
loop. So a body is first only measured (its values stay undecoded), and what is decoded is small: everything beside the
prompt together. What may be large (prompts, messages, ids to decode) stays as it is until somebody asks for it, when
all else has been checked. It is decoded only in a shape that is served, of which no more than the first so many items
are ever made.

Images are larger than all that: where there may be any, they are cut out while the body arrives (`cutouts`), and the
limits above are those of the rest.

What does not belong here: what the fields mean (`validation`), and HTTP (`http`).
"""

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NotRequired, Self, TypedDict

import msgspec

from control_plane.router.shares import Shares
from control_plane.router.validation.cutouts import NO_CUTOUTS, Body, Cutouts, Sieve
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
    "text_too_long": f"messages: at most {limits.CHAT_CHARACTERS_MAX} characters together",
    "parts_count": f"messages: at most {limits.MESSAGE_PARTS_MAX} parts in one message, {limits.MESSAGES_MAX} together",
    "tokens_shape": "tokens: must be a list of token ids",
    "tokens_count": f"tokens: at most {limits.PROMPT_TOKENS_MAX} tokens",
}


class BodyTooLarge(InvalidArgument):
    """Refused while reading: no more than the limit is ever held."""


# -- memory ------------------------------------------------------------------------------------------------------------
class BodyMemory:
    """Counts the bytes of all bodies that are being read or checked. Admission of requests comes later, and too late
    for memory: a thousand clients may each send megabytes before the first of them is a request. Of all bytes a tenant
    has a share."""

    def __init__(self, bytes_max: int, *, tenants: int = 1) -> None:
        self._shares = Shares(bytes_max, tenants=tenants)

    @property
    def held_bytes(self) -> int:
        return self._shares.total

    def hold(self, body_bytes_max: int, tenant: str = "", *, json_bytes_max: int | None = None) -> "HeldBody":
        """`json_bytes_max`: of what is left when long data URLs are cut out; None: they are not."""
        return HeldBody(self, body_bytes_max, tenant, json_bytes_max)

    def take(self, tenant: str, size_bytes: int) -> None:
        if not (self._shares.fits(size_bytes) and self._shares.allows(tenant, size_bytes)):
            raise ResourceExhausted("too many request bodies at once", retry_after_ms=limits.RETRY_AFTER_MS)
        self._shares.take(tenant, size_bytes)

    def give(self, tenant: str, size_bytes: int) -> None:
        self._shares.give(tenant, size_bytes)


class HeldBody:
    """One body as it arrives, by its own bytes: a length header is a claim. Leaving the block gives them back."""

    __slots__ = ("_bytes_max", "_json_bytes_max", "_memory", "_parts", "_sieve", "_tenant", "size_bytes")

    def __init__(self, memory: BodyMemory, bytes_max: int, tenant: str, json_bytes_max: int | None) -> None:
        self._memory = memory
        self._bytes_max = bytes_max
        self._tenant = tenant
        self._parts: list[bytes] = []
        self._json_bytes_max = json_bytes_max
        self._sieve = Sieve()
        self.size_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.give(self._tenant, self.size_bytes)
        self._parts, self._sieve, self.size_bytes = [], Sieve(), 0

    def append(self, part: bytes) -> None:
        if self.size_bytes + len(part) > self._bytes_max:
            raise BodyTooLarge(f"body: at most {self._bytes_max} bytes", field="body")
        self._memory.take(self._tenant, len(part))
        self.size_bytes += len(part)
        if self._json_bytes_max is None:
            self._parts.append(part)
        else:
            self._sift(part, self._json_bytes_max)

    def whole(self) -> Body:
        """For the one who decodes it; the parts are not kept beside it."""
        if self._json_bytes_max is not None:
            return self._sieve.whole()
        parts, self._parts = self._parts, []
        return Body(b"".join(parts))

    def _sift(self, part: bytes, json_bytes_max: int) -> None:
        self._sieve.feed(part)
        if self._sieve.rest_bytes > json_bytes_max:
            raise BodyTooLarge(f"body: at most {json_bytes_max} bytes beside its images", field="body")


# -- decoding ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class BodyShape:
    """The fields of one endpoint: which are known, and which of those may be large (of `LARGE`)."""

    known: Set[str]
    large: Set[str]


@dataclass(frozen=True, slots=True)
class Undecoded:
    """A large value of which nothing is known but where it ends."""

    name: str
    raw: msgspec.Raw
    cutouts: Cutouts = NO_CUTOUTS

    def decode_untrusted(self) -> Any:
        if self.name == "messages":  # only they may hold images
            return _decode_messages_untrusted(bytes(self.raw), self.cutouts)
        if self.cutouts.bytes_in(self.raw) > limits.BODY_BYTES_MAX:  # of `/tokenize`, whose bodies may hold images
            raise FrameError("prompt_tokens")
        return LARGE[self.name](bytes(self.cutouts.put_back(self.raw)))


def decode_body_untrusted(body: bytes | Body, shape: BodyShape) -> dict[str, Any]:
    """The known fields as values, the large ones as `Undecoded` values (for `large_value`) unless they are null.
    An unknown field has its name and None: nobody looks at what it holds."""
    whole = Body(body) if isinstance(body, bytes) else body
    raw_fields = _raw_fields_untrusted(whole, shape.large)
    fields: dict[str, Any] = dict.fromkeys(raw_fields)
    for name in raw_fields.keys() & shape.known:
        raw = raw_fields[name]
        if name not in shape.large:
            fields[name] = _small_untrusted(raw, whole.cutouts)
        elif raw != _NULL:
            fields[name] = Undecoded(name, raw, whole.cutouts)
    return fields


def _small_untrusted(raw: msgspec.Raw, cutouts: Cutouts) -> Any:
    """By itself no larger than all of them together may be: a reference of the client's own is in more than one."""
    if cutouts.bytes_in(raw) > limits.BODY_BESIDE_PROMPT_BYTES_MAX:
        raise FrameError("json_beside_prompt")
    return _decode_untrusted(cutouts.put_back(raw))


def large_value(fields: Mapping[str, Any], name: str) -> Any:
    """A field that may be large, from a body or from elsewhere. Worth asking for last."""
    value = fields.get(name)
    try:
        return value.decode_untrusted() if isinstance(value, Undecoded) else value
    except FrameError as error:
        raise refusal(error) from None


def refusal(error: FrameError) -> InvalidArgument:
    message = ERRORS[error.reason]
    return InvalidArgument(message, field=message.partition(":")[0])


class _LargeOnly(msgspec.Struct):
    """Decoding to this walks over every other field without making anything of it."""

    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    tokens: msgspec.Raw = msgspec.Raw()


_DENSE_BYTES: Final = 256  # for each one to find: a call of `find` takes longer than counting in so many bytes
# A conversation has that many: role, content, type and text. As many names take half a millisecond.
_COLONS_FEW: Final = 4 * limits.MESSAGES_MAX + limits.BODY_FIELDS_MAX
_ANYTHING: Final = msgspec.json.Decoder()
_LARGE_ONLY: Final = msgspec.json.Decoder(_LargeOnly)
_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT: Final = msgspec.json.Decoder(str)
_IDS: Final = msgspec.json.Decoder(list[int])


def _raw_fields_untrusted(whole: Body, large: Set[str]) -> dict[str, msgspec.Raw]:
    """Names and undecoded values. Names are objects too: where there may be many, the body is measured before any is
    made. Each has its colon, so most large bodies (one text, many ids) are walked over only once."""
    body = whole.json
    if len(body) > limits.BODY_BESIDE_PROMPT_BYTES_MAX and _more_than(_COLONS_FEW, b":", body):
        _check_beside(whole, msgspec.structs.asdict(_decode_untrusted(body, _LARGE_ONLY, "json_not_object")), large)
    fields: dict[str, msgspec.Raw] = _decode_untrusted(body, _FIELDS, "json_not_object")
    _check_beside(whole, fields, large)
    if len(fields) > limits.BODY_FIELDS_MAX:
        raise FrameError("json_fields")
    return fields


def _check_beside(whole: Body, values: Mapping[str, msgspec.Raw], large: Set[str]) -> None:
    """What was cut out counts where it belongs."""
    large_values = [values[name] for name in large & values.keys()]
    large_bytes = sum(memoryview(raw).nbytes + whole.cutouts.bytes_in(raw) for raw in large_values)
    if len(whole.json) + whole.cutouts.size_bytes - large_bytes > limits.BODY_BESIDE_PROMPT_BYTES_MAX:
        raise FrameError("json_beside_prompt")


def _more_than(count: int, sought: bytes, text: bytes) -> bool:
    """Of a long text it looks at no more than it must, several times faster than `bytes.count` if there is little."""
    if len(text) < _DENSE_BYTES * count:
        return text.count(sought) > count
    at = -1
    return all((at := text.find(sought, at + 1)) >= 0 for _ in range(count + 1))


def _decode_untrusted(
    raw: bytes | msgspec.Raw, decoder: "msgspec.json.Decoder[Any]" = _ANYTHING, misfit: str = "json_syntax"
) -> Any:
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
_STRIDE_BYTES: Final = 64 << 10
_TEXTS: Final = _first(limits.PROMPTS_MAX + 1, str)
_LISTS_OF_IDS: Final = _first(limits.PROMPTS_MAX + 1, list[int])


def _decode_prompt_untrusted(raw: bytes) -> str | list[Any]:
    """A text, ids, a list of texts, or a list of lists of ids: OpenAI's four."""
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


def _decode_tokens_untrusted(raw: bytes) -> list[int]:
    _check_id_count(raw, "tokens_count")
    return list(_decode_untrusted(raw, _IDS, "tokens_shape"))


def _check_id_count(raw: bytes, reason: str) -> None:
    """Ids hold no commas: as many ids, one more. Too many are found near the beginning."""
    commas = 0
    for start in range(0, len(raw), _STRIDE_BYTES):
        commas += raw.count(b",", start, start + _STRIDE_BYTES)
        if commas >= limits.PROMPT_TOKENS_MAX:
            raise FrameError(reason)


# -- messages ----------------------------------------------------------------------------------------------------------
class _Part(TypedDict):
    type: str
    text: NotRequired[str | None]
    image_url: NotRequired[msgspec.Raw]
    uuid: NotRequired[msgspec.Raw]


class _ImageUrl(TypedDict):
    url: str
    detail: NotRequired[str | None]


class _Message(TypedDict):
    role: str
    content: NotRequired[msgspec.Raw]
    name: NotRequired[str | None]
    tool_call_id: NotRequired[str | None]
    tool_calls: NotRequired[msgspec.Raw]


Content = str | list[str | _Part] | None

_MESSAGES: Final = _first(limits.MESSAGES_MAX + 1, _Message)
_CONTENTS: Final = msgspec.json.Decoder(list[Content])
_IMAGE_URL: Final = msgspec.json.Decoder(str | _ImageUrl)
_LABEL: Final = msgspec.json.Decoder(str | None)
_PARTS: Final = _first(limits.MESSAGE_PARTS_MAX + 1, msgspec.Raw)
_QUOTES_FEW: Final = 4 * limits.MESSAGE_PARTS_MAX  # every part has two at least
_IMAGE: Final = b"image_url"
_CONTENT_BYTES_FEW: Final = 4 * _QUOTES_FEW  # whatever is in them, decoding as many together as we do is no work
_TOGETHER: Final = 32  # contents in one call of the decoder: each of 1,024 calls would cost as much as its content


def _decode_messages_untrusted(raw: bytes, cutouts: Cutouts = NO_CUTOUTS) -> list[dict[str, Any]]:
    messages = _items_untrusted(raw, _MESSAGES, "messages_shape", "messages_count")
    images = _IMAGE in raw or b"\\" in raw  # its name may be written with escapes
    parts = 0
    for start in range(0, len(messages), _TOGETHER):
        some = messages[start : start + _TOGETHER]
        contents = _contents_untrusted([bytes(message.get("content", _NULL)) for message in some])
        lengths = [len(content) for content in contents if isinstance(content, list)]
        parts += sum(lengths)
        if parts > limits.MESSAGES_MAX or max(lengths, default=0) > limits.MESSAGE_PARTS_MAX:
            raise FrameError("parts_count")
        for message, content in zip(some, contents, strict=True):
            message["content"] = content
            if "tool_calls" in message:  # what they hold is not looked at: that there are some is enough
                message["tool_calls"] = _NO_CALLS.fullmatch(bytes(message["tool_calls"])) is None
        if images:
            _read_images_untrusted(contents, cutouts)
    if cutouts.items:
        texts = _Texts(cutouts)
        for message in messages:
            _put_texts_back_untrusted(message, texts)
    return messages


def _contents_untrusted(raws: list[bytes]) -> list[Content]:
    for raw in raws:
        if len(raw) > _CONTENT_BYTES_FEW and raw.startswith(b"[") and _more_than(_QUOTES_FEW, b'"', raw):
            _items_untrusted(raw, _PARTS, "messages_shape", "parts_count")  # it may be a list of a million
    return list(_decode_untrusted(b"[%s]" % b",".join(raws), _CONTENTS, "messages_shape"))


# -- images in messages ------------------------------------------------------------------------------------------------
def _read_images_untrusted(contents: list[Content], cutouts: Cutouts) -> None:
    """Decode what only an image's part has."""
    for content in contents:
        for part in content if isinstance(content, list) else ():
            if not isinstance(part, str) and "image_url" in part:
                _read_image_untrusted(part, cutouts)


def _read_image_untrusted(part: Any, cutouts: Cutouts) -> None:
    part["image_url"] = _image_untrusted(_fitting_untrusted(part["image_url"], _IMAGE_URL), cutouts)
    if "uuid" in part:
        part["uuid"] = _fitting_untrusted(part["uuid"], _LABEL)


def _put_texts_back_untrusted(message: dict[str, Any], texts: "_Texts") -> None:
    """What began like a data URL and was none."""
    for name in ("content", "name", "tool_call_id"):
        if isinstance(message.get(name), str):
            message[name] = texts.original_untrusted(message[name])
    if isinstance(message["content"], list):
        parts = message["content"]
        parts[:] = [texts.original_untrusted(part) if isinstance(part, str) else part for part in parts]
        for part in parts:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                part["text"] = texts.original_untrusted(part["text"])


def _image_untrusted(value: Any, cutouts: Cutouts) -> Any:
    """A URL, as text or as what was cut out; or an object that has one."""
    if isinstance(value, dict):
        return {**value, "url": cutouts.named(value["url"]) or value["url"]}
    return cutouts.named(value) or value if isinstance(value, str) else value


def _fitting_untrusted(raw: msgspec.Raw, decoder: "msgspec.json.Decoder[Any]") -> Any:
    """False where it is of another shape: whether that is a mistake depends on the kind of part that it is in."""
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


class _Texts:
    """Texts of one conversation as they were, if all that are put back are no longer than a body of text may be: a
    client's own references may name one cutout a thousand times."""

    def __init__(self, cutouts: Cutouts) -> None:
        self._cutouts = cutouts
        self._left_bytes = limits.BODY_BYTES_MAX

    def original_untrusted(self, text: str) -> str:
        cutout = self._cutouts.named(text)
        if cutout is None:
            return text
        self._left_bytes -= cutout.size_bytes
        if self._left_bytes < 0:
            raise FrameError("text_too_long")
        return str(_decode_untrusted(cutout.quoted(), _TEXT))


_NULL: Final = msgspec.Raw(b"null")
_NO_CALLS: Final = re.compile(rb"null|\[[ \t\r\n]*\]")

LARGE: Final[Mapping[str, Callable[[bytes], Any]]] = {
    "prompt": _decode_prompt_untrusted,
    "messages": _decode_messages_untrusted,
    "tokens": _decode_tokens_untrusted,
}
