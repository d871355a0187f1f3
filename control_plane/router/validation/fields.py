"""One field of a request at a time: its value, the default where it is null or absent, or a fixed sentence that names
the field and the limit. No sentence repeats what the client sent.

Every reader checks the exact JSON type: `true` is not 1, `1.0` is not an integer, `"5"` is not a number.

What does not belong here: which fields there are and what they mean (`validation`, `sampling_fields`, ...).
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from engine.base import limits
from engine.base.errors import InvalidArgument

Fields = Mapping[str, Any]


def refuse(name: str, text: str) -> InvalidArgument:
    """`name` is the field as the client wrote it, dots included; it opens the sentence and is the error's `param`."""
    return InvalidArgument(f"{name}: {text}", field=name)


def number(fields: Fields, name: str, default: float, low: float, high: float, *, low_open: bool = False) -> float:
    value = optional_number(fields, name, low, high, low_open=low_open)
    return default if value is None else value


def optional_number(
    fields: Fields, name: str, low: float, high: float, *, low_open: bool = False, prefix: str = ""
) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    inside = is_number(value) and low <= value <= high and not (low_open and value == low)
    if not inside:  # NaN is inside nothing
        bracket = "(" if low_open else "["
        raise refuse(prefix + name, f"must be a number in {bracket}{low:g}, {high:g}]")
    return float(value) or 0.0  # -0.0 is 0.0


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def integer(fields: Fields, name: str, default: int, low: int, high: int, *, prefix: str = "") -> int:
    value = optional_integer(fields, name, low, high, prefix=prefix)
    return default if value is None else value


def optional_integer(fields: Fields, name: str, low: int, high: int, *, prefix: str = "") -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise refuse(prefix + name, f"must be an integer in [{low}, {high}]")
    return value


def boolean(fields: Fields, name: str, default: bool = False, *, prefix: str = "") -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not bool:
        raise refuse(prefix + name, "must be true or false")
    return value


def optional_string(fields: Fields, name: str, characters_max: int, *, prefix: str = "") -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not str or len(value) > characters_max:
        raise refuse(prefix + name, f"must be a string of at most {characters_max} characters")
    return value


def object_or_empty(fields: Fields, name: str, *, prefix: str = "") -> dict[str, Any]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise refuse(prefix + name, "must be an object")
    return value


def strings(fields: Fields, name: str, count_max: int, characters_max: int) -> tuple[str, ...]:
    """A list of strings, none empty and none too long; nothing at all for null."""
    values = fields.get(name)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(type(value) is str for value in values):
        raise refuse(name, "must be a list of strings")
    if len(values) > count_max:
        raise refuse(name, f"at most {count_max} strings")
    if not all(1 <= len(value) <= characters_max for value in values):
        raise refuse(name, f"each string must have 1 to {characters_max} characters")
    return tuple(values)


def token_ids(fields: Fields, name: str, count_max: int, vocab_size: int) -> tuple[int, ...]:
    ids = fields.get(name)
    if ids is None:
        return ()
    if not isinstance(ids, list):
        raise refuse(name, "must be a list of token ids")
    if len(ids) > count_max:
        raise refuse(name, f"at most {count_max} ids")
    check_token_ids(ids, vocab_size, field=name)
    return tuple(ids)


def check_token_ids(ids: list[Any], vocab_size: int, *, field: str) -> None:
    """Every element an id of the model's. By the decoder, in one pass: a prompt may hold 131072 of them."""
    token_id = Annotated[int, msgspec.Meta(ge=0, lt=vocab_size)]
    try:
        msgspec.convert(ids, list[token_id])
    except msgspec.ValidationError:
        raise refuse(field, f"token ids must be integers in [0, {vocab_size - 1}]") from None


_NOT_A_WORD: Final = re.compile(r"[^A-Za-z0-9._:/-]")


def word(text: str) -> str:
    """A value for one `key=value` of a log line or for a header: no spaces, no line breaks, no escapes, not long."""
    return _NOT_A_WORD.sub("_", text[: limits.REQUEST_ID_CHARACTERS_MAX])
