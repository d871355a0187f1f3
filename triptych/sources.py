"""Where settings come from, and which of several wins: flag, environment, file, default, in this order.

    configured = read(ServeOptions, flags={"port": 9000}, file=Path("triptych.yaml"))
    configured.options                  the frozen options that a process reads
    configured.found["port"].origin     flag

pydantic-settings merges and converts. What a person did wrong is said in our words, and where: FILE:LINE, the name of a
variable, or a flag. A name that there is not is refused in a file, with the nearest that there is; in an environment,
which others share, it is a warning.

Not here: which settings there are (`settings`), and what may be combined (the options dataclasses).
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Generic

from pydantic import BeforeValidator, ValidationError, create_model
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from control_plane.options import OptionError
from deploy.children import OWN_VARIABLES, PREFIX
from triptych.config_file import Entry, read_entries
from triptych.mistakes import ConfigError, nearest, wrong_value
from triptych.settings import COMMANDS, Options, Setting, Spelling, build, settings_of

CONFIG_VARIABLE: Final = f"{PREFIX}CONFIG"
MASK: Final = "***"


class Source(StrEnum):
    FLAG = "flag"
    ENVIRONMENT = "environment"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Origin:
    """Who says so, and where: a variable's name, or FILE:LINE."""

    source: Source
    where: str = ""

    def __str__(self) -> str:
        return f"{self.source.value} {self.where}".rstrip()


@dataclass(frozen=True, slots=True)
class Found:
    """A setting's value, and whose it is."""

    setting: Setting
    value: Any = field(repr=False)  # perhaps a key
    origin: Origin

    @property
    def shown(self) -> Any:
        """As JSON has it. A secret is a mask, or nothing."""
        return MASK if self.setting.said.secret and self.value else plain(self.value)


@dataclass(frozen=True, slots=True)
class Configured(Generic[Options]):
    """All settings of one command, by name."""

    kind: type[Options]
    found: Mapping[str, Found]

    @property
    def options(self) -> Options:
        """Raises `ConfigError`, which begins with what is to be changed: a flag, a variable, a line of the file."""
        try:
            return build(self.kind, {name: found.value for name, found in self.found.items()})
        except OptionError as error:
            found = self.found.get(error.option)
            place = _place(found.setting, found.origin) if found else f"--{error.option}"
            raise ConfigError(f"{place}: {error}") from None


def read(kind: type[Options], flags: Mapping[str, Any], file: Path | None = None) -> Configured[Options]:
    """`flags`: those that were given, by name. `file`: or the one that TRIPTYCH_CONFIG names. Raises `ConfigError`."""
    settings = settings_of(kind)
    entries = _entries(kind, file)
    merging = _merging(settings, {_key(name): entry.value for name, entry in entries.items()})
    variables = EnvSettingsSource(merging)()
    origins = {s.name: _origin(s, flags, variables, entries) for s in settings}
    try:
        merged = merging(**{_key(name): value for name, value in flags.items()})
    except ValidationError as error:
        raise ConfigError(*_sentences(error, settings, origins)) from None
    found = {s.name: Found(s, getattr(merged, s.key), origins[s.name]) for s in settings}
    if missing := [_needed(each.setting) for each in found.values() if each.setting.required and not each.value]:
        raise ConfigError(*missing)
    if keyless := list(_keyless(found.values())):
        raise ConfigError(*keyless)
    return Configured(kind, found)


def unknown_variables(environment: Iterable[str]) -> Iterator[str]:
    """A sentence for each variable that is called like ours and is none."""
    known = {CONFIG_VARIABLE, *OWN_VARIABLES}
    known |= {setting.variable for kind in COMMANDS.values() for setting in settings_of(kind)}
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known:
            yield f"{name} is not a setting{nearest(name, known, common=PREFIX)}"


def schema(kind: type) -> dict[str, Any]:
    """JSON schema of the file of the command that takes these options."""
    settings = settings_of(kind)
    written = _merging(settings, {}).model_json_schema()
    for choices in written["$defs"].values():
        choices.pop("description", None)  # a docstring of ours
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {s.name: _property(s, written["properties"][s.key]) for s in settings},
        "patternProperties": {_either(s.name): {"$ref": f"#/properties/{s.name}"} for s in settings if "-" in s.name},
        "additionalProperties": False,
        "$defs": written["$defs"],
    }


def plain(value: Any) -> Any:
    """As JSON and YAML have it."""
    if isinstance(value, tuple | frozenset):
        return sorted(map(plain, value)) if isinstance(value, frozenset) else [plain(each) for each in value]
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


# -- the file ----------------------------------------------------------------------------------------------------------
def _entries(kind: type, file: Path | None) -> Mapping[str, Entry]:
    if file is None and (named := os.environ.get(CONFIG_VARIABLE)):
        file = Path(named)
    entries = read_entries(file) if file is not None else {}
    known = {setting.name for setting in settings_of(kind)}
    if unknown := [f"{entry.place}: {_unknown(name, kind)}" for name, entry in entries.items() if name not in known]:
        raise ConfigError(*unknown)
    return entries


def _unknown(name: str, kind: type) -> str:
    """An older flag's name and another command's setting are known well enough to say so."""
    settings = settings_of(kind)
    if renamed := next((s.name for s in settings if name in s.said.aliases), None):
        return f"unknown setting '{name}'; it is called {renamed} now"
    others = [command for command, other in COMMANDS.items() if any(s.name == name for s in settings_of(other))]
    if others:
        command = next(command for command, own in COMMANDS.items() if own is kind)
        return f"'{name}' is a setting of triptych {others[0]}, not of triptych {command}"
    return f"unknown setting '{name}'{nearest(name, [s.name for s in settings])}"


# -- merging -----------------------------------------------------------------------------------------------------------
def _merging(settings: Sequence[Setting], file: Mapping[str, Any]) -> type[BaseSettings]:
    """What pydantic-settings merges with: its sources belong to a class, so each file has one."""

    class Merging(BaseSettings):
        model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid")

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, dict(file))

    fields: dict[str, Any] = {setting.key: _field(setting) for setting in settings}
    return create_model("Settings", __base__=Merging, **fields)


def _field(setting: Setting) -> tuple[Any, Any]:
    """Type and default as pydantic wants them. What is required may be missing in one source and be in another."""
    if setting.required:
        return Annotated[setting.type | None, NoDecode, _check(setting)], None
    return Annotated[setting.type, NoDecode, _check(setting)], setting.default


def _check(setting: Setting) -> BeforeValidator:
    if (spelling := setting.said.spelling) is not None:
        return BeforeValidator(_spelled(spelling), json_schema_input_type=spelling.forms)
    if setting.several:
        return BeforeValidator(_listed, json_schema_input_type=setting.type | str)
    return BeforeValidator(_number if setting.kind in (int, float) else _same)


def _spelled(spelling: Spelling) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        try:
            return _number(spelling.read(value))
        except ValueError:
            raise PydanticCustomError("spelling", "is not written in any of the ways") from None

    return read


def _listed(value: Any) -> Any:
    """Several values in one text are a JSON list, or parted by commas."""
    if not isinstance(value, str):
        return value
    if not value.startswith("["):
        return [part.strip() for part in value.split(",") if part.strip()]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise PydanticCustomError("list", "is not a list") from None


def _number(value: Any) -> Any:
    """Python counts with booleans, and YAML's `on` is one."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "is not a number")
    return value


def _same(value: Any) -> Any:
    return value


# -- what is said of it ------------------------------------------------------------------------------------------------
def _origin(
    setting: Setting, flags: Mapping[str, Any], variables: Mapping[str, Any], entries: Mapping[str, Entry]
) -> Origin:
    if setting.name in flags:
        return Origin(Source.FLAG)
    if setting.key in variables:
        return Origin(Source.ENVIRONMENT, setting.variable)
    return Origin(Source.FILE, entries[setting.name].place) if setting.name in entries else Origin(Source.DEFAULT)


def _sentences(error: ValidationError, settings: Sequence[Setting], origins: Mapping[str, Origin]) -> Iterator[str]:
    """The first mistake of each setting: a list may have a hundred."""
    by_key = {setting.key: setting for setting in settings}
    first = {str(mistake["loc"][0]): mistake["input"] for mistake in reversed(error.errors(include_url=False))}
    for key, value in reversed(first.items()):
        setting = by_key[key]
        yield f"{_place(setting, origins[setting.name])}: {wrong_value(setting, value)}"


def _place(setting: Setting, origin: Origin) -> str:
    """How a sentence about a setting begins: with what the person would change."""
    if origin.source is Source.FILE:
        return f"{origin.where}: {setting.name}"
    return origin.where or f"--{setting.name}"


def _needed(setting: Setting) -> str:
    return f"--{setting.name}: is needed; or set {setting.variable}, or '{setting.name}' in a file"


def _keyless(found: Iterable[Found]) -> Iterator[str]:
    """A secret that was given and is empty, as by a script whose own variable was not set: a person who gives one
    believes that it is asked for. An empty variable is none to pydantic-settings, so it is looked for here."""
    for each in found:
        if not each.setting.said.secret or each.value:
            continue
        is_default = each.origin.source is Source.DEFAULT
        origin = Origin(Source.ENVIRONMENT, each.setting.variable) if is_default else each.origin
        if not is_default or each.setting.variable in os.environ:
            yield f"{_place(each.setting, origin)}: holds no key; leave it out for a server without keys"


def _property(setting: Setting, written: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in written.items() if name not in ("title", "default")}
    said = {"description": setting.said.help} | kept
    return said if setting.required else said | {"default": plain(setting.default)}


def _either(name: str) -> str:
    """Underscores are as good, and editors that complete names offer only the other."""
    return f"^{name.replace('-', '[-_]')}$"


def _key(name: str) -> str:
    return name.replace("-", "_")
