"""What a chat request says, read into a `Conversation` and into the words of completions for everything that both have.

Content is text: parts of type `text` are joined by newlines, as vLLM does for templates that take strings, and parts of
any other type are refused by their place. Tools are not served, so calls of them inside a conversation are refused too.

What does not belong here: which token ids a conversation becomes (`chat_template`, `vocabulary`), and whatever is the
same for completions (`validation`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from control_plane.router.validation import body as bodies
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
OTHER_PARTS: Final = frozenset(
    (
        *("image_url", "input_image", "image_pil", "image_embeds", "video_url", "input_audio", "audio_url"),
        *("audio_embeds", "file", "refusal", "thinking"),
    )
)
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
    """Checked, and still text."""

    messages: Sequence[Mapping[str, str]]  # each with a role and a content; with a name or tool_call_id if it had one
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)

    @property
    def characters(self) -> int:
        """Of all that a template may print."""
        variables = sum(len(value) for value in self.variables.values() if isinstance(value, str))
        return variables + sum(len(text) for message in self.messages for text in message.values())

    def echo_text(self) -> str | None:
        """The last message, where the answer goes on in its role; as vLLM has it, nothing otherwise."""
        last = self.messages[-1]
        answered_as = "assistant" if self.add_generation_prompt else last["role"]
        return last["content"] if last["role"] == answered_as else None


def read_conversation(fields: Fields) -> Conversation:
    settings = read_settings(fields)
    return Conversation(messages=_messages(bodies.large_value(fields, "messages")), **settings)


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
def _messages(value: Any) -> list[Mapping[str, str]]:
    if value is None:
        raise refuse("messages", "required")
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise InvalidArgument(bodies.ERRORS["messages_shape"], field="messages")
    if not 1 <= len(value) <= limits.MESSAGES_MAX:
        raise refuse("messages", f"must hold 1 to {limits.MESSAGES_MAX} messages")
    messages: list[Mapping[str, str]] = []
    for message in value:
        try:
            messages.append(_message(message))
        except InvalidArgument as error:
            place = f"messages[{len(messages)}]"
            raise InvalidArgument(place + error.message, field=f"{place}{error.field}") from None
    if sum(len(message["content"]) for message in messages) > limits.CHAT_CHARACTERS_MAX:
        raise refuse("messages", f"at most {limits.CHAT_CHARACTERS_MAX} characters together")
    return messages


def _message(message: Mapping[str, Any]) -> Mapping[str, str]:
    """Says `.role` of what is wrong with the role: of a thousand messages no more than one needs its whole name."""
    role = message.get("role")
    if role not in ROLES:
        raise refuse(".role", f"must be one of: {', '.join(ROLES)}")
    if message.get("tool_calls"):
        raise refuse(".tool_calls", "tools are not served")
    checked = {"role": role, "content": _content(message.get("content"), role)}
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            checked[name] = optional_string(message, name, limits.MESSAGE_NAME_CHARACTERS_MAX, prefix=".")
    return checked


def _content(content: Any, role: str) -> str:
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
        position = next(position for position, text in enumerate(texts) if not isinstance(text, str))
        raise _part_refused(content[position], f".content[{position}]") from None


def _text(part: Any) -> Any:
    """A string, if it is a part that is served."""
    return part.get("text") if isinstance(part, dict) and part.get("type") in TEXT_PARTS else None


def _part_refused(part: Any, where: str) -> InvalidArgument:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in TEXT_PARTS:
        shown = f"{kind} parts are" if kind in OTHER_PARTS else "this type of part is"
        return refuse(where, f"{shown} not served; accepted types: {', '.join(TEXT_PARTS)}")
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
