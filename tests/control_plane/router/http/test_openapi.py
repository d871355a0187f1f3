"""The document says what the server does: all of its fields and no others, its limits, and its own error shape."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from control_plane.router.access.tenants import Keys, Tenant
from control_plane.router.http import openapi
from control_plane.router.validation import validator as validation
from tests.attack.bad_requests import CHAT, COMPLETIONS, body_with, repeated
from tests.attack.test_bad_input import GOOD, ask, router
from tests.attack.test_fuzzed_bodies import generate
from tests.control_plane.router.edge_fakes import CARD, events

DOCUMENT = openapi.document(CARD, "1.2.3")
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]


def properties(name: str) -> dict[str, Any]:
    found: dict[str, Any] = SCHEMAS[name]["properties"]
    return found


def test_it_is_openapi() -> None:
    OPENAPI_31_VALIDATOR.validate(DOCUMENT)
    assert DOCUMENT["info"]["version"] == "1.2.3"


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_body_is_a_json_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])


def test_references_lead_somewhere() -> None:
    text = json.dumps(DOCUMENT)
    for reference in {part.partition('"')[0] for part in text.split('"$ref": "')[1:]}:
        found: Any = DOCUMENT
        for key in reference.removeprefix("#/").split("/"):
            found = found[key]
    assert text.count("$ref") > len(DOCUMENT["paths"])


# -- fields ------------------------------------------------------------------------------------------------------------
REQUESTS = {
    "CompletionRequest": validation.COMPLETIONS,
    "ChatCompletionRequest": validation.CHAT,
    "TokenizeRequest": validation.TOKENIZE,
    "DetokenizeRequest": validation.DETOKENIZE,
}


@pytest.mark.parametrize("name", REQUESTS)
def test_every_field_is_described_and_no_other(name: str) -> None:
    assert properties(name).keys() == REQUESTS[name].shape.known


@pytest.mark.parametrize("name", REQUESTS)
def test_every_field_says_what_it_means(name: str) -> None:
    assert [field for field, schema in properties(name).items() if not schema.get("description")] == []


@pytest.mark.parametrize("name", REQUESTS)
def test_what_is_not_served_is_described_as_that(name: str) -> None:
    for field, neutral in REQUESTS[name].not_served.items():
        assert properties(name)[field]["enum"] == [None, *neutral]


# -- paths -------------------------------------------------------------------------------------------------------------
async def test_every_described_path_is_there_and_asks_for_a_key_as_described() -> None:
    served = router(Keys({"sk-right": Tenant("acme")}))
    for path, methods in DOCUMENT["paths"].items():
        ((method, described),) = methods.items()
        request = replace(GOOD, path=path.replace("{name}", "tiny"), method=method.upper())
        assert ((await ask(served.app, request)).status == 401) is (described["security"] != []), path
    everybody = router()
    for path, methods in DOCUMENT["paths"].items():
        request = replace(GOOD, path=path.replace("{name}", "tiny"), method=next(iter(methods)).upper())
        assert (await ask(everybody.app, request)).status in (200, 400), path


async def test_it_is_served_whole() -> None:
    reply = await ask(router().app, replace(GOOD, path="/openapi.json", method="GET"))
    assert json.loads(reply.body) == {**DOCUMENT, "info": {**DOCUMENT["info"], "version": "0"}}


# -- answers -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "body", "whole", "chunk"),
    [
        (COMPLETIONS, b'{"prompt":[1],"logprobs":0}', "Completion", "Completion"),
        (CHAT, b'{"messages":[{"role":"user","content":"a"}]}', "ChatCompletion", "ChatCompletionChunk"),
    ],
)
async def test_answers_are_as_described(path: str, body: bytes, whole: str, chunk: str) -> None:
    served = router()
    served.core.script = generate
    reply = await ask(served.app, replace(GOOD, path=path, body=body))
    validator(whole).validate(json.loads(reply.body))
    streamed = body[:-1] + b',"stream":true,"stream_options":{"include_usage":true}}'
    for event in events((await ask(served.app, replace(GOOD, path=path, body=streamed))).body):
        validator(chunk).validate(event)


@pytest.mark.parametrize(
    ("path", "name", "body"),
    [
        ("/v1/models", "Models", b""),
        ("/v1/models/tiny", "Model", b""),
        ("/version", "Version", b""),
        ("/ready", "Readiness", b""),
        ("/load", "Load", b""),
        ("/tokenizer_info", "TokenizerInfo", b""),
        ("/tokenize", "Tokenized", b'{"prompt":"a"}'),
        ("/detokenize", "Detokenized", b'{"tokens":[5]}'),
        ("/nowhere", "Error", b"{}"),
        (COMPLETIONS, "Error", b"{}"),
    ],
)
async def test_small_answers_are_as_described(path: str, name: str, body: bytes) -> None:
    reply = await ask(router().app, replace(GOOD, path=path, body=body, method="POST" if body else "GET"))
    validator(name).validate(json.loads(reply.body))


def validator(name: str) -> Any:
    return jsonschema.Draft202012Validator({**DOCUMENT, "$ref": f"#/components/schemas/{name}"})


# -- limits ------------------------------------------------------------------------------------------------------------
def bounds(name: str, schema: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The field, a value at the edge of what is described, and one just outside."""
    step = 1 if "integer" in schema.get("type", ()) else 0.001
    for bound, outward in (("minimum", -step), ("maximum", step)):
        if bound in schema:
            yield name, str(schema[bound]), str(schema[bound] + outward)
    if "exclusiveMinimum" in schema:
        yield name, str(schema["exclusiveMinimum"] + 0.001), str(schema["exclusiveMinimum"])
    if "maxItems" in schema:
        item = '"a"' if "string" in schema["items"]["type"] else "5"
        yield name, repeated(item, schema["maxItems"]), repeated(item, schema["maxItems"] + 1)
    if "maxLength" in schema:
        yield name, json.dumps("a" * schema["maxLength"]), json.dumps("a" * (schema["maxLength"] + 1))
    for kind in schema.get("anyOf", ()):
        yield from bounds(name, kind)
    for inner, inner_schema in schema.get("properties", {}).items():
        yield from bounds(f"{name}.{inner}", inner_schema)


LIMITED = [
    (path, *case)
    for path, request in ((COMPLETIONS, "CompletionRequest"), (CHAT, "ChatCompletionRequest"))
    for name, schema in properties(request).items()
    if name not in ("prompt", "messages")
    for case in bounds(name, schema)
]


async def test_the_described_limits_are_those_that_hold() -> None:
    served = router()
    for path, name, edge, outside in LIMITED:
        refused = await ask(served.app, replace(GOOD, path=path, body=body_with(path, name, outside)))
        error = json.loads(refused.body)["error"]
        assert (refused.status, error["param"]) == (400, name), outside
        allowed = await ask(served.app, replace(GOOD, path=path, body=body_with(path, name, edge)))
        assert json.loads(allowed.body).get("error") != error, edge  # it may be too much beside another field
    assert len(LIMITED) > 80
