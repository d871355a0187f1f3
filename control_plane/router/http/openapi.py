"""The public port as an OpenAPI 3.1 document: paths, what they take and answer, the one shape of an error.

Limits are those of the tables and the model, so that the document says what the server does.

What does not belong here: the fields of requests (`openapi_fields`) and of answers (`openapi_answers`), serving the
document (`http`), the operator's port.
"""

from dataclasses import dataclass
from typing import Final, Literal

from control_plane.router.http import openapi_answers as answers
from control_plane.router.http import openapi_fields as fields
from control_plane.router.http.openapi_answers import ref
from control_plane.router.http.openapi_fields import Schema
from control_plane.router.http.responses import RETRYABLE
from control_plane.router.text.vocabulary import ModelCard
from engine.base import limits

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
KEY: Final = "key"


def document(card: ModelCard, version: str) -> Schema:
    """The whole description of a router that serves `card`."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "Triptych", "version": version, "description": "OpenAI's dialect as vLLM speaks it."},
        "paths": paths(),
        "components": {
            "schemas": requests(card) | answers.schemas(),
            "responses": {"Error": _error_response()},
            "securitySchemes": {KEY: {"type": "http", "scheme": "bearer", "description": "only where keys are set"}},
        },
    }


# -- operations --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One method of one path. `request` and `answer` name schemas; None: no body."""

    path: str
    summary: str
    method: Literal["get", "post"] = "get"
    request: str | None = None
    answer: str | None = None
    streams: str | None = None  # what one server-sent event holds
    work: bool = False  # it is for workers, who may be busy or absent
    open: bool = False  # without a key
    others: tuple[int, ...] = ()  # further statuses


OPERATIONS: Final = (
    Operation(
        path="/v1/completions",
        summary="Go on with a text",
        method="post",
        request="CompletionRequest",
        answer="Completion",
        streams="Completion",
        work=True,
    ),
    Operation(
        path="/v1/chat/completions",
        summary="Answer in a conversation",
        method="post",
        request="ChatCompletionRequest",
        answer="ChatCompletion",
        streams="ChatCompletionChunk",
        work=True,
        others=(403,),  # an image from where none may be fetched
    ),
    Operation(path="/v1/models", summary="What is served", answer="Models"),
    Operation(path="/v1/models/{name}", summary="One model", answer="Model", others=(404,)),
    Operation(
        path="/tokenize",
        summary="Text to token ids",
        method="post",
        request="TokenizeRequest",
        answer="Tokenized",
        others=(403,),
    ),
    Operation(
        path="/detokenize",
        summary="Token ids to text",
        method="post",
        request="DetokenizeRequest",
        answer="Detokenized",
    ),
    Operation(path="/tokenizer_info", summary="What the tokenizer is", answer="TokenizerInfo"),
    Operation(path="/version", summary="This server's version", answer="Version", open=True),
    Operation(path="/health", summary="Whether the process answers", open=True),
    Operation(path="/ping", summary="The same as /health", open=True),
    Operation(path="/ready", summary="Whether requests can be served", answer="Readiness", open=True, others=(503,)),
    Operation(path="/load", summary="Requests under way", answer="Load"),
    Operation(path="/abort_requests", summary="End requests of one's own", method="post", request="AbortRequest"),
    Operation(
        path="/reset_prefix_cache", summary="Forget computed prompts; administrators only", method="post", others=(403,)
    ),
)


def paths() -> Schema:
    return {operation.path: {operation.method: _operation(operation)} for operation in OPERATIONS}


def _operation(operation: Operation) -> Schema:
    return {
        "operationId": operation.path.strip("/{}").replace("/", "_").replace("{", ""),
        "summary": operation.summary,
        "parameters": _parameters(operation),
        **({} if operation.request is None else {"requestBody": _body(operation.request)}),
        "responses": {"200": _success(operation)}
        | {str(status): {"$ref": "#/components/responses/Error"} for status in statuses(operation)},
        "security": [] if operation.open else [{KEY: []}],
    }


def statuses(operation: Operation) -> list[int]:
    """Of all the refusals and failures that a client of this operation may see."""
    found = {*operation.others, 431, 500, 503}
    if not operation.open:
        found.add(401)
    if operation.request is not None:
        found |= {400, 404, 408, 413, 429, 504}
    if operation.work:
        found |= {499, 502}
    return sorted(found)


def _parameters(operation: Operation) -> list[Schema]:
    if "{name}" in operation.path:
        return [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    return _headers() if operation.work else []


def _headers() -> list[Schema]:
    milliseconds = {"type": "integer", "minimum": 1, "maximum": limits.SLO_MS_MAX}
    name = {"type": "string", "maxLength": limits.REQUEST_ID_CHARACTERS_MAX}
    return [
        _header("x-request-id", "your own name for it; it comes back and is in our log", name),
        _header("x-slo-ttft-ms", "the first token is of no use later", milliseconds),
        _header("x-slo-tpot-ms", "a target for each further token", milliseconds),
    ]


def _header(name: str, text: str, schema: Schema) -> Schema:
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": text}


def _body(name: str) -> Schema:
    return {"required": True, "content": {JSON: {"schema": ref(name)}}}


def _success(operation: Operation) -> Schema:
    content = {
        media_type: {"schema": ref(name)}
        for media_type, name in ((JSON, operation.answer), (EVENTS, operation.streams))
        if name is not None
    }
    return {"description": "done"} | ({"content": content} if content else {})


# -- errors ------------------------------------------------------------------------------------------------------------
def _error_response() -> Schema:
    header = {"schema": {"type": "integer"}, "description": f"seconds; with {' and '.join(map(str, RETRYABLE))}"}
    return {
        "description": "refused, or failed",
        "headers": {"retry-after": header},
        "content": {JSON: {"schema": ref("Error")}},
    }


# -- bodies ------------------------------------------------------------------------------------------------------------
def requests(card: ModelCard) -> dict[str, Schema]:
    return {
        "CompletionRequest": fields.completion(card),
        "ChatCompletionRequest": fields.chat(card),
        "TokenizeRequest": fields.tokenize(card),
        "DetokenizeRequest": fields.detokenize(card),
        "AbortRequest": fields.abort(),
    }
