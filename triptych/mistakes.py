"""Words for what a person set wrong: what a setting accepts, what it was given, which name was probably meant."""

import difflib
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Final

from triptych.settings import Setting

SHOWN_MAX: Final = 60  # characters of a wrong value that are repeated to whoever gave it

_ONE: Final[dict[type, str]] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
}
_SEVERAL: Final[dict[type, str]] = {int: "whole numbers", str: "text, or a list of texts"}
_GIVEN: Final[dict[type, str]] = {
    type(None): "nothing",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


class ConfigError(ValueError):
    """What a person set is wrong. A line per mistake, each saying where."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


def wrong_value(setting: Setting, value: Any) -> str:
    """A secret is not repeated, not even a wrong one."""
    return f"must be {accepted(setting)}, not {described(value, shown=not setting.said.secret)}"


def accepted(setting: Setting) -> str:
    if setting.said.spelling is not None:
        return setting.said.spelling.accepted
    if issubclass(setting.kind, Enum):
        known = ", ".join(str(each.value) for each in setting.kind)
        return f"one or several of {known}" if setting.several else f"one of {known}"
    return (_SEVERAL if setting.several else _ONE)[setting.kind]


def described(value: Any, *, shown: bool = True) -> str:
    kind = _GIVEN.get(type(value), f"a {type(value).__name__}")  # YAML also knows dates
    if not shown or not isinstance(value, str | int | float) or value is None:
        return kind
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}..."
    return f"{kind} ({text!r})" if isinstance(value, str) else f"{kind} ({text})"


def nearest(name: str, known: Iterable[str], *, common: str = "") -> str:
    """The end of a sentence about an unknown name. `common`: what all begin with, which makes none of them likelier."""
    rests = sorted(each.removeprefix(common) for each in known)
    found = difflib.get_close_matches(name.removeprefix(common), rests, n=1)
    return f"; did you mean {common}{found[0]}?" if found else ""
