"""Bodies of answers as JSON schemas, as far as a client may rely on them. Fields may be added to any but the error.

What does not belong here: requests (`openapi_fields`), and which answer belongs to which path (`openapi`).
"""

from typing import Any

from control_plane.router.http.openapi_fields import Schema, record
from control_plane.router.http.responses import ERROR_TYPES


def schemas() -> dict[str, Schema]:
    return {
        "Error": error(),
        "Usage": usage(),
        "Completion": completion(),
        "ChatCompletion": chat(),
        "ChatCompletionChunk": chat_chunk(),
        **small(),
    }


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def error() -> Schema:
    inner = {
        "message": text("names the field and its limit, and repeats nothing of what was sent"),
        "type": {"enum": sorted(set(ERROR_TYPES.values()))},
        "param": {"type": ["string", "null"], "description": "the field, as you wrote it"},
        "code": {"enum": sorted(ERROR_TYPES), "description": "the HTTP status"},
    }
    return whole({"error": whole(inner, "what is wrong", closed=True)}, "every refusal and failure", closed=True)


# -- text --------------------------------------------------------------------------------------------------------------
def completion() -> Schema:
    choice = {"index": count("first those of the first prompt"), "text": text("of this piece"), **_ending()}
    return _answer("text_completion", whole(choice, "one text, or a piece of one"))


def chat() -> Schema:
    message = whole({"role": text("assistant"), "content": {"type": ["string", "null"]}}, "what the model says")
    return _answer("chat.completion", whole({"index": count(""), "message": message, **_ending()}, "one answer"))


def chat_chunk() -> Schema:
    delta = record({"role": text("once"), "content": {"type": ["string", "null"]}}, "what is new")
    return _answer("chat.completion.chunk", whole({"index": count(""), "delta": delta, **_ending()}, "a piece of one"))


def _answer(kind: str, choice: Schema) -> Schema:
    properties = {
        "id": text("by which it can be aborted"),
        "object": {"const": kind},
        "created": count("seconds since 1970"),
        "model": text("its name"),
        "choices": {"type": "array", "items": choice},
        "usage": {"anyOf": [ref("Usage"), {"type": "null"}]},
        "triptych": {"type": "object", "description": "how it was served; in the last piece"},
    }
    return record(properties, "an answer, or with stream a piece of it", required=properties.keys() - {"triptych"})


def _ending() -> dict[str, Schema]:
    return {
        "logprobs": {"type": ["object", "null"]},
        "finish_reason": {"enum": ["stop", "length", None], "description": "null: there is more to come"},
        "stop_reason": {"type": ["string", "integer", "null"], "description": "which stop string or token ended it"},
    }


def usage() -> Schema:
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    images = record({"image": count("that stand for images")}, "only where there are any")
    hits = record({"image": count("of images that did not go through the tower again")}, "only where there are any")
    cached = {"cached_tokens": count("not computed again"), "cached_multimodal_tokens": hits}
    details = record(cached | {"multimodal_tokens": images}, "of the prompt")
    properties = {name: count("") for name in names} | {"prompt_tokens_details": details}
    return record(properties, "tokens of all prompts and choices together", required=names)


# -- the small ones ----------------------------------------------------------------------------------------------------
def small() -> dict[str, Schema]:
    model: dict[str, Schema] = {
        "id": text("its name"),
        "object": {"const": "model"},
        "max_model_len": count("prompt and output together"),
    }
    models: dict[str, Schema] = {"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}
    ids = {"type": "array", "items": count("a token id")}
    tokenized = {"count": count("of the tokens"), "max_model_len": count(""), "tokens": ids}
    return {
        "Model": whole(model, "what is served"),
        "Models": whole(models, "all that is served"),
        "Version": whole({"version": text("")}, "this server's"),
        "Readiness": whole({"ready": {"type": "boolean"}, "in_flight": count("requests")}, "whether it serves"),
        "Load": whole({"server_load": count("requests under way")}, "what it has to do"),
        "Tokenized": whole(tokenized, "a text as the model reads it"),
        "Detokenized": whole({"prompt": text("the text")}, "what the ids say"),
        "TokenizerInfo": record({}, "its class, its special tokens, its chat template"),
    }


# -- kinds of values ---------------------------------------------------------------------------------------------------
def whole(properties: dict[str, Schema], description: str, *, closed: bool = False) -> Schema:
    """All of them are always there."""
    return record(properties, description, required=properties, closed=closed)


def text(description: str) -> Schema:
    return {"type": "string", **_described(description)}


def count(description: str) -> Schema:
    return {"type": "integer", "minimum": 0, **_described(description)}


def _described(description: str) -> dict[str, Any]:
    return {"description": description} if description else {}
