"""A configuration file: flat YAML, one setting a line, each with the line that it stands on.

    model: smollm2
    block-size: 16        # or block_size
    api-key: [sk-1, sk-2]

Only the text is read here. Which settings there are, and what values they take, is `sources`' to say; what it says of
a file's line begins with that line, as compilers do it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from triptych.mistakes import ConfigError

BYTES_MAX: Final = 1 << 20  # a file of settings has some hundred lines; whoever names /dev/zero is told so


@dataclass(frozen=True, slots=True)
class Entry:
    """One line's value, as YAML understands it."""

    value: Any
    place: str  # FILE:LINE


def read_entries(path: Path) -> Mapping[str, Entry]:
    """By key, with hyphens. Raises `ConfigError`."""
    entries: dict[str, Entry] = {}
    for key, value, line in _lines(path, _text(path)):
        entry = Entry(value, f"{path}:{line}")
        if not isinstance(key, str):
            raise ConfigError(f"{entry.place}: a setting's name is text, such as 'port'")
        name = key.replace("_", "-")
        if name in entries:
            raise ConfigError(f"{entry.place}: '{name}' has been set before, at {entries[name].place}")
        entries[name] = entry
    return entries


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(BYTES_MAX + 1)
        text = content.decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    if len(content) > BYTES_MAX:
        raise ConfigError(f"{path}: at most {BYTES_MAX} bytes")
    return text


def _lines(path: Path, text: str) -> Iterator[tuple[Any, Any, int]]:
    """Key, value and line of everything at the top. The loader keeps the place of each node."""
    try:
        loader = yaml.SafeLoader(text)
        top = loader.get_single_node()
        for key, value in _pairs(path, top):
            named = loader.construct_object(key, deep=True)
            yield named, loader.construct_object(value, deep=True), key.start_mark.line + 1
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{_place(path, error)}: is not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # a control character, a date of 2024-99-99, 10^4 brackets
        raise ConfigError(f"{path}: is not YAML that can be read") from None


def _pairs(path: Path, top: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    if top is None:  # nothing but comments
        return []
    if not isinstance(top, yaml.MappingNode):
        raise ConfigError(f"{path}:{top.start_mark.line + 1}: must be lines of 'name: value'")
    return list(top.value)


def _place(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f"{path}:{mark.line + 1}" if mark else str(path)
