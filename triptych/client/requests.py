"""What a caller asks for, as a message. Values are checked by the server; here only what no message could hold."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict

from google.protobuf.descriptor import FieldDescriptor

from control_plane.wire import inference_pb2 as pb
from engine.base.errors import InvalidArgument

Part = str | Mapping[str, Any]
"""A text, or as HTTP has it: {"type": "text", "text": "..."}, {"type": "image_url", "image_url": {"url": "data:..."}};
or an image as a file: {"type": "image", "image": b"..."}."""

Message = Mapping[str, str | Sequence[Part]]
"""One of a conversation: {"role": "user", "content": "..."}; instead of one text its content may be a list of parts."""

Prompt = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or a conversation, which the model's own template turns into a prompt."""


class Options(TypedDict, total=False):
    """Everything beside the prompt. What is absent, or None, is the server's default; names are those of HTTP."""

    model: str | None
    request_id: str | None  # a label of the caller's: logged, never a key

    # how much
    max_tokens: int | None
    min_tokens: int | None
    n: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None

    # which tokens
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None

    # a constraint: one of these
    json_schema: Mapping[str, Any] | str | None
    json_object: bool | None
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None

    # what comes back
    logprobs: int | None  # alternatives per token
    prompt_logprobs: int | None
    return_token_ids: bool | None  # the prompt's, too
    skip_special_tokens: bool | None

    # how the prompt is read
    add_special_tokens: bool | None
    truncate_prompt_tokens: int | None
    add_generation_prompt: bool | None  # this one and the next two: of a conversation
    continue_final_message: bool | None
    chat_template_kwargs: Mapping[str, Any] | None

    # how it is served
    priority: int | None  # lower is earlier
    ttft_slo_ms: int | None
    tpot_slo_ms: int | None
    cache_salt: str | None
    codec: str | None
    kl_budget: float | None


_OF_REQUEST: Final = frozenset(
    (
        *("model", "request_id", "return_token_ids", "add_special_tokens", "priority", "ttft_slo_ms", "tpot_slo_ms"),
        *("cache_salt", "codec", "kl_budget"),
    )
)
_OF_CHAT: Final = frozenset(("add_generation_prompt", "continue_final_message", "chat_template_kwargs"))


def generate_request(prompt: Prompt, options: Options) -> pb.GenerateRequest:
    """Raises `InvalidArgument` for a value that the field cannot hold, `TypeError` for a name that is none."""
    request = pb.GenerateRequest()
    for name in options.keys() - Options.__annotations__.keys():
        raise TypeError(f"unknown option {name!r}")
    _set_prompt(request, prompt)
    for name, value in options.items():
        if value is not None:
            _set(_holder(request, name), *_as_field(name, value))
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _set(request, "text", prompt, "prompt")
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        _set(request.chat, "messages", list(map(_message, prompt)), "messages")
    else:
        request.tokens.SetInParent()  # also of no ids: the server says what is wrong with them
        _set(request.tokens, "ids", prompt, "prompt")


def _message(said: Any) -> Any:
    """Parts go into a field of their own."""
    content = said.get("content") if isinstance(said, Mapping) else None
    if isinstance(content, str) or not isinstance(content, Sequence):
        return said
    others = {name: value for name, value in said.items() if name != "content"}
    return {**others, "parts": list(map(_part, content))}


def _part(part: Any) -> dict[str, Any]:
    match part:
        case str() as text:
            return {"text": text}
        case {"type": "text", "text": text}:
            return {"text": text}
        case {"type": "image", "image": bytes() as file}:
            return {"image": {"data": file}}
        case {"type": "image_url", "image_url": {"url": str() as url}} | {
            "type": "image_url",
            "image_url": str() as url,
        }:
            return {"image": {"url": url}}
    raise InvalidArgument(f"messages: must be {_WANTED['messages']}", field="messages")


def _holder(request: pb.GenerateRequest, name: str) -> Any:
    if name in _OF_REQUEST:
        return request
    if name not in _OF_CHAT:
        return request.sampling
    if not request.HasField("chat"):
        raise InvalidArgument(f"{name}: needs a conversation as the prompt", field=name)
    return request.chat


def _as_field(name: str, value: Any) -> tuple[str, Any]:
    match name:
        case "stop" if isinstance(value, str):
            return name, [value]
        case "choice":
            return name, {"values": value}
        case "json_schema" if not isinstance(value, str):
            return name, _json(name, value)
        case "chat_template_kwargs":
            return "chat_template_kwargs_json", _json(name, value)
        case _:
            return name, value


def _json(name: str, value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        raise InvalidArgument(f"{name}: must be what JSON can hold", field=name) from None


def _set(message: Any, name: str, value: Any, called: str = "") -> None:
    try:
        message.MergeFrom(type(message)(**{name: value}))
    except (TypeError, ValueError):  # protobuf's words are about its own types, and repeat the value
        called = called or name
        wanted = _WANTED.get(called) or _wanted(message.DESCRIPTOR.fields_by_name[name])
        raise InvalidArgument(f"{called}: must be {wanted}", field=called) from None


# -- what a field holds, in words --------------------------------------------------------------------------------------
_WANTED: Final[Mapping[str, str]] = {
    "prompt": "text, a list of token ids, or a list of messages",
    "messages": "a list of {'role': text, 'content': text, or a list of text and image parts}",
    "logit_bias": "token ids and numbers",
    "choice": "a list of texts",
}
_ONE: Final[Mapping[int, tuple[str, str]]] = {
    FieldDescriptor.CPPTYPE_STRING: ("text", "texts"),
    FieldDescriptor.CPPTYPE_BOOL: ("true or false", "true or false"),
    FieldDescriptor.CPPTYPE_FLOAT: ("a number", "numbers"),
    FieldDescriptor.CPPTYPE_DOUBLE: ("a number", "numbers"),
    FieldDescriptor.CPPTYPE_INT32: ("a whole number of 32 bits", "whole numbers of 32 bits"),
    FieldDescriptor.CPPTYPE_INT64: ("a whole number of 64 bits", "whole numbers of 64 bits"),
    FieldDescriptor.CPPTYPE_UINT32: ("a whole number from 0 to 4294967295", "whole numbers from 0 to 4294967295"),
    FieldDescriptor.CPPTYPE_UINT64: ("a whole number of 64 bits, 0 or more", "whole numbers of 64 bits, 0 or more"),
}
"""One value, and several."""


def _wanted(field: FieldDescriptor) -> str:
    one, several = _ONE[field.cpp_type]
    return f"a list of {several}" if field.is_repeated else one
