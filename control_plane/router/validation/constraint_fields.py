"""`response_format`, `structured_outputs` and vLLM's older `guided_*` fields: at most one `Constraint` between them.

Shapes only. Whether a grammar can be compiled, and in what time, is `engine.grammar`'s knowledge; the validator asks it
off the event loop.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from control_plane.router.validation.fields import Fields, object_or_empty, refuse
from engine.base import limits
from engine.types import Constraint, ConstraintKind


class NamedConstraint(NamedTuple):
    """A constraint and the field that the client wrote it in, for whoever finds a fault in it later."""

    field: str
    constraint: Constraint


def read_constraint(fields: Fields) -> NamedConstraint | None:
    found = [*_response_format(fields), *_structured_outputs(fields), *_guided(fields)]
    if len(found) > 1:
        raise refuse(found[1].field, f"only one constraint at a time; {found[0].field} is one already")
    return found[0] if found else None


# -- where constraints are written -------------------------------------------------------------------------------------
def _response_format(fields: Fields) -> Iterator[NamedConstraint]:
    """OpenAI's: {"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}."""
    wanted = object_or_empty(fields, "response_format")
    kind = wanted.get("type") if wanted else "text"
    if kind == "json_object":
        yield NamedConstraint("response_format", Constraint(ConstraintKind.JSON_OBJECT))
    elif kind == "json_schema":
        inner = wanted.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, dict) else None
        if schema is None:
            raise refuse("response_format", "json_schema must be an object that holds a schema")
        yield _json_schema("response_format", schema)
    elif kind != "text":
        raise refuse("response_format", "type must be one of: text, json_object, json_schema")


def _structured_outputs(fields: Fields) -> Iterator[NamedConstraint]:
    """vLLM's: {"json" | "regex" | "choice" | "grammar": ..., or "json_object": true}."""
    wanted = {key: value for key, value in object_or_empty(fields, "structured_outputs").items() if value is not None}
    json_object = wanted.pop("json_object", False)
    if type(json_object) is not bool:
        raise refuse("structured_outputs.json_object", "must be true or false")
    if json_object:
        yield NamedConstraint("structured_outputs.json_object", Constraint(ConstraintKind.JSON_OBJECT))
    for key, value in wanted.items():
        if key in READERS:
            yield READERS[key](f"structured_outputs.{key}", value)
        elif value is not False:  # a switch of vLLM's that is off
            raise refuse("structured_outputs", f"served are: json_object, {', '.join(READERS)}")


def _guided(fields: Fields) -> Iterator[NamedConstraint]:
    for key, read in READERS.items():
        value = fields.get(f"guided_{key}")
        if value is not None:
            yield read(f"guided_{key}", value)


# -- their values ------------------------------------------------------------------------------------------------------
def _json_schema(field: str, value: Any) -> NamedConstraint:
    """An object, or the text of one."""
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            raise refuse(field, "must be a JSON schema: an object, or the text of one") from None
    if not isinstance(value, dict):
        raise refuse(field, "must be a JSON schema: an object, or the text of one")
    return _named(field, ConstraintKind.JSON_SCHEMA, msgspec.json.encode(value).decode())


def _regex(field: str, value: Any) -> NamedConstraint:
    return _named(field, ConstraintKind.REGEX, _text(field, value))


def _grammar(field: str, value: Any) -> NamedConstraint:
    return _named(field, ConstraintKind.GRAMMAR, _text(field, value))


def _choice(field: str, value: Any) -> NamedConstraint:
    if not isinstance(value, list) or not value or not all(type(text) is str and text for text in value):
        raise refuse(field, "must be a list of strings, with at least 1 string and none of them empty")
    return _named(field, ConstraintKind.CHOICE, msgspec.json.encode(value).decode())


READERS: Final[Mapping[str, Callable[[str, Any], NamedConstraint]]] = {
    "json": _json_schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
}


def _text(field: str, value: Any) -> str:
    if type(value) is not str or not value:
        raise refuse(field, "must be a string that is not empty")
    return value


def _named(field: str, kind: ConstraintKind, text: str) -> NamedConstraint:
    if len(text.encode()) > limits.CONSTRAINT_BYTES_MAX:
        raise refuse(field, f"at most {limits.CONSTRAINT_BYTES_MAX} bytes")
    return NamedConstraint(field, Constraint(kind, text))
