"""What a chat request says, read into a `Conversation` and into the words of completions for everything that both have.

Content is text: parts of type `text` are joined by newlines, as vLLM does for templates that take strings. Where the
served model sees, users' messages may have images between them; then parts stay parts. Parts of any other type are
refused by their place. Tools are not served, so calls of them inside a conversation are refused too.

What does not belong here: which token ids a conversation becomes (`chat_template`, `vocabulary`), what is in an image
(`media`), and whatever is the same for completions (`validation`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from control_plane.router.media.decoding import ImageFile
from control_plane.router.media.pipe import Kind
from control_plane.router.media.reader import ImagePart
from control_plane.router.validation import body as bodies
from control_plane.router.validation.cutouts import Cutout
from control_plane.router.validation.fields import (
    Fields,
    boolean,
    integer,
    object_or_empty,
    optional_integer,
    optional_string,
    refuse,
)
from engine.base import limits
from engine.base.errors import InvalidArgument

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS: Final = ("text", "input_text", "output_text")
IMAGE_PARTS: Final = ("image_url", "input_image")
OTHER_PARTS: Final = frozenset(
    (
        *(*IMAGE_PARTS, "image_pil", "image_embeds", "video_url", "input_audio", "audio_url"),
        *("audio_embeds", "file", "refusal", "thinking"),
    )
)
DETAILS: Final = ("auto", "low", "high")  # OpenAI's; the model's own processor decides here
SERVED: Final = frozenset(
    (
        *("messages", "max_completion_tokens", "top_logprobs", "add_generation_prompt", "continue_final_message"),
        *("chat_template_kwargs", "reasoning_effort"),
    )
)
NOT_SERVED: Final[Mapping[str, tuple[Any, ...]]] = {
    "documents": ([],),
    "chat_template": (),  # a template is a program
    "chat_template_content_format": ("auto", "string"),
    "parallel_tool_calls": (True, False),  # without tools
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "include_reasoning": (True, False),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
}
# Variables that templates are given by us, and functions that they rely on.
RESERVED: Final = frozenset(
    (
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
        *("conversation", "tokenize", "raise_exception", "strftime_now", "namespace", "dict", "range", "loop"),
        *("lipsum", "cycler", "joiner", "self", "caller", "varargs", "kwargs"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Checked, and still text.

    A message has a role and a content, and a name or tool_call_id if it had one. All are texts, except that a content
    with images is a list of parts, {"type": "text", "text": ...} or {"type": "image"}; `images` are in their order.
    """

    messages: Sequence[Mapping[str, Any]]
    images: tuple[ImagePart, ...] = ()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    @property
    def characters(self) -> int:
        """Of all that a template may print."""
        variables = sum(len(value) for value in self.variables.values() if isinstance(value, str))
        texts = sum(map(_content_characters, self.messages))
        names = sum(len(message["role"]) for message in self.messages)
        return variables + texts + names + sum(_label_characters(m) for m in self.messages if len(m) > 2)

    def echo_text(self) -> str | None:
        """The last message, where the answer goes on in its role; as vLLM has it, nothing otherwise."""
        last = self.messages[-1]
        answered_as = "assistant" if self.add_generation_prompt else last["role"]
        return "".join(content_texts(last)) if last["role"] == answered_as else None


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """All that somebody wrote: of a message everything but its role."""
    texts = content_texts(message)
    if len(message) > 2:
        texts += [message[name] for name in ("name", "tool_call_id") if name in message]
    return texts


def content_texts(message: Mapping[str, Any]) -> list[str]:
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]


def _content_characters(message: Mapping[str, Any]) -> int:
    """Asked of a thousand messages at a time: nearly all are strings."""
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(map(len, content_texts(message)))


def _label_characters(message: Mapping[str, Any]) -> int:
    return sum(len(message[name]) for name in ("name", "tool_call_id") if name in message)


def read_conversation(fields: Fields, images_max: int = 0) -> Conversation:
    """`images_max`: so many images in all; 0: the served model sees none."""
    settings, reader = read_settings(fields), _MessageReader(images_max)
    messages = _messages(bodies.large_value(fields, "messages"), reader)
    return Conversation(messages=messages, images=tuple(reader.images), **settings)


def read_settings(fields: Fields) -> dict[str, Any]:
    """What a `Conversation` says beside its messages."""
    continued = boolean(fields, "continue_final_message")
    prompted = boolean(fields, "add_generation_prompt", not continued)
    if continued and prompted:
        raise refuse("continue_final_message", "and add_generation_prompt cannot both be true")
    return {
        "add_generation_prompt": prompted,
        "continue_final_message": continued,
        "variables": _variables(fields),
    }


def in_completions_words(fields: Fields) -> Fields:
    """`max_tokens` and `logprobs` as completions have them, and no `echo`: a chat's does not cover the prompt."""
    return {**fields, "logprobs": _logprobs(fields), "echo": None}


def output_field(fields: Fields) -> str:
    """Which of the two fields says how long the answer may be: the newer name wins, as vLLM has it."""
    return "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"


def _logprobs(fields: Fields) -> int | None:
    """OpenAI's chat splits into a switch and a number what completions have as one number."""
    wanted = boolean(fields, "logprobs")
    alternatives = optional_integer(fields, "top_logprobs", 0, limits.LOGPROBS_MAX)
    if alternatives and not wanted:
        raise refuse("top_logprobs", "needs logprobs to be true")
    return integer(fields, "top_logprobs", 0, 0, limits.LOGPROBS_MAX) if wanted else None


# -- messages ----------------------------------------------------------------------------------------------------------
def _messages(value: Any, reader: "_MessageReader") -> list[Mapping[str, Any]]:
    if value is None:
        raise refuse("messages", "required")
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise InvalidArgument(bodies.ERRORS["messages_shape"], field="messages")
    if not 1 <= len(value) <= limits.MESSAGES_MAX:
        raise refuse("messages", f"must hold 1 to {limits.MESSAGES_MAX} messages")
    try:
        messages = list(map(reader.message, value))
    except InvalidArgument as error:
        place = reader.place
        raise InvalidArgument(place + error.message, field=f"{place}{error.field}") from None
    if sum(map(_content_characters, messages)) > limits.CHAT_CHARACTERS_MAX:
        raise refuse("messages", f"at most {limits.CHAT_CHARACTERS_MAX} characters together")
    return messages


class _MessageReader:
    """Reads one message after the other, and gathers their images.

    Says `.role` of what is wrong with the role: of a thousand messages no more than one needs its whole name.
    """

    def __init__(self, images_max: int) -> None:
        self.images: list[ImagePart] = []
        self._images_max = images_max
        self._read = 0

    @property
    def place(self) -> str:
        """Of the message that is being read."""
        return f"messages[{self._read}]"

    def message(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        role = message.get("role")
        if role not in ROLES:
            raise refuse(".role", f"must be one of: {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise refuse(".tool_calls", "tools are not served")
        checked = {"role": role, "content": self._content(message.get("content"), role)}
        for name in ("name", "tool_call_id"):
            if message.get(name) is not None:
                checked[name] = optional_string(message, name, limits.MESSAGE_NAME_CHARACTERS_MAX, prefix=".")
        self._read += 1
        return checked

    def _content(self, content: Any, role: str) -> str | list[Mapping[str, str]]:
        """An assistant's may be absent: OpenAI's own answers say null beside tool calls."""
        if isinstance(content, str):
            return content
        if content is None and role == "assistant":
            return ""
        if not isinstance(content, list):
            raise refuse(".content", "must be a string or a list of parts")
        if len(content) > limits.MESSAGE_PARTS_MAX:
            raise refuse(".content", f"at most {limits.MESSAGE_PARTS_MAX} parts")
        texts = [part if isinstance(part, str) else _text(part) for part in content]  # a bare string: vLLM's shorthand
        try:
            return "\n".join(texts)
        except TypeError:
            return [
                self._part(part, text, f".content[{at}]", role)
                for at, (part, text) in enumerate(zip(content, texts, strict=True))
            ]

    def _part(self, part: Any, text: Any, where: str, role: str) -> Mapping[str, str]:
        if isinstance(text, str):
            return {"type": "text", "text": text}
        if not self._images_max or not isinstance(part, dict) or part.get("type") not in IMAGE_PARTS:
            raise _part_refused(part, where, sees=self._images_max > 0)
        if role != "user":
            raise refuse(where, "images are served in users' messages only")
        if len(self.images) >= self._images_max:
            raise refuse(where, f"at most {self._images_max} images in one conversation")
        self.images.append(ImagePart(self.place + where, _image_source(part, f"{where}.image_url")))
        optional_string(part, "uuid", limits.REQUEST_ID_CHARACTERS_MAX, prefix=f"{where}.")  # a label, and no key
        return {"type": "image"}


def _text(part: Any) -> Any:
    """A string, if it is a part that is served."""
    return part.get("text") if isinstance(part, dict) and part.get("type") in TEXT_PARTS else None


def _image_source(part: Mapping[str, Any], where: str) -> str | ImageFile:
    """A URL by itself or in an object, as text or as it was cut out of its body; or a file, which no JSON can hold."""
    source = part.get("image_url")
    if isinstance(source, Mapping):
        if source.get("detail") not in (None, *DETAILS):
            raise refuse(f"{where}.detail", f"must be one of: {', '.join(DETAILS)}")
        source = source.get("url")
    match source:
        case str():
            return source
        case bytes():
            return ImageFile(Kind.FILE, [source])
        case Cutout():
            return ImageFile(Kind.DATA_URL_JSON, source.pieces)
    raise refuse(where, "must be a URL, or an object that has one")


def _part_refused(part: Any, where: str, *, sees: bool) -> InvalidArgument:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in TEXT_PARTS:
        shown = f"{kind} parts are" if kind in OTHER_PARTS else "this type of part is"
        accepted = (*TEXT_PARTS, *IMAGE_PARTS) if sees else TEXT_PARTS
        return refuse(where, f"{shown} not served; accepted types: {', '.join(accepted)}")
    return refuse(f"{where}.text", "must be a string")


# -- variables of the template -----------------------------------------------------------------------------------------
def _variables(fields: Fields) -> dict[str, Any]:
    variables = object_or_empty(fields, "chat_template_kwargs")
    if len(variables) > limits.TEMPLATE_VARIABLES_MAX:
        raise refuse("chat_template_kwargs", f"at most {limits.TEMPLATE_VARIABLES_MAX} names")
    for name, value in variables.items():
        _check_variable(name, value)
    effort = optional_string(fields, "reasoning_effort", limits.MESSAGE_NAME_CHARACTERS_MAX)
    return dict(variables) if effort is None else {"reasoning_effort": effort, **variables}


def _check_variable(name: str, value: Any) -> None:
    if not name.isidentifier() or len(name) > limits.MESSAGE_NAME_CHARACTERS_MAX or name.startswith("_"):
        raise refuse("chat_template_kwargs", "names must be plain words of letters, digits and underscores")
    if name in RESERVED or name.endswith("_token"):
        raise refuse("chat_template_kwargs", "holds a name that is given to templates by the server itself")
    if not (value is None or type(value) in (str, int, float, bool)):
        raise refuse("chat_template_kwargs", "values must be strings, numbers, true, false or null")
    if isinstance(value, str) and len(value) > limits.TEMPLATE_VARIABLE_CHARACTERS_MAX:
        raise refuse(
            "chat_template_kwargs", f"strings have at most {limits.TEMPLATE_VARIABLE_CHARACTERS_MAX} characters"
        )
