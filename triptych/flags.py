"""Settings as flags of a command: written once in `settings`, parsed and shown by typer.

    @configured_by(RouterOptions)
    def router(configured: Configured[RouterOptions]) -> None: ...

gives `router` a flag for each setting, hidden ones for their older names, and `--config`. What the person gave goes to
`sources`, with the environment and the file. pydantic is imported only then: `--help` does without.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.children import PREFIX
from triptych.mistakes import ConfigError
from triptych.settings import NEEDED, Setting, setting, settings_of

if TYPE_CHECKING:
    from triptych.sources import Configured

NEGATIVE = "no-"
METAVARS = {int: "N", float: "X", bool: " ", str: "TEXT", Path: "FILE"}

ConfigFlag = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A YAML file of settings, called as flags are. Flags and variables win.",
        rich_help_panel="Configuration",
        metavar="FILE",
    ),
]
KeyFlag = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        help=f"Or {PREFIX}API_KEY, which `ps` does not show.",
        metavar="KEY",
        envvar=f"{PREFIX}API_KEY",
        show_envvar=False,
    ),
]
"""Of a client, which has one."""


def _pem(flag: str, help: str) -> Any:
    return typer.Option(flag, help=help, metavar="FILE", rich_help_panel="Certificates")


CacertFlag = Annotated[Path | None, _pem("--cacert", "Who signed the server's certificate; default: the system's.")]
CertFlag = Annotated[Path | None, _pem("--cert", "One's own certificate, where the server asks for one.")]
CertKeyFlag = Annotated[Path | None, _pem("--key", "Its private key; default: in the same file.")]


def configured_by(kind: type, *, positional: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator. The command takes `configured` and, if it likes, parameters of its own that typer understands.

    `positional`: the setting that may also be given without its flag, as the first argument.
    """
    settings = settings_of(kind)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, p in inspect.signature(command).parameters.items()
            if name != "configured"
        ]

        @functools.wraps(command)
        def with_flags(ctx: typer.Context, config: Path | None, **values: Any) -> None:
            named = {p.name: values.pop(p.name) for p in own}
            flags = _given(settings, {name: value for name, value in values.items() if _typed(ctx, name)})
            command(configured=_read(kind, flags, config), **named)

        parameters = [*_positional(kind, positional), *_parameters(settings), *_context(), *own]
        _sign(with_flags, parameters)
        return with_flags

    return decorate


def option(kind: type, field: str) -> Any:
    """The flag of one setting, for a command that shares some of another's: `Annotated[str, option(EngineOptions,
    "model")]`. Its variable counts too."""
    found = setting(kind, field)
    return _option(found, variable=found.variable)


def _read(kind: type, flags: Mapping[str, Any], config: Path | None) -> "Configured[Any]":
    from triptych.sources import read, unknown_variables

    for sentence in unknown_variables(os.environ):
        typer.secho(f"triptych: warning: {sentence}", err=True, fg="yellow")
    return read(kind, flags, config)


# -- what was given ----------------------------------------------------------------------------------------------------
def _typed(ctx: typer.Context, parameter: str) -> bool:
    source = ctx.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _given(settings: tuple[Setting, ...], values: Mapping[str, Any]) -> dict[str, Any]:
    """By the setting's name, whichever of its flags was used. Two that say different things are a mistake."""
    flags: dict[str, Any] = {}
    for found in settings:
        said = [_meant(flag, values[_parameter(flag)]) for flag in _spellings(found) if _parameter(flag) in values]
        if any(value != said[0] for value in said[1:]):  # nan differs from itself
            raise ConfigError(f"--{found.name}: is given twice, with different values")
        if said:
            flags[found.name] = said[0]
    return flags


def _spellings(found: Setting) -> tuple[str, ...]:
    names = (found.name, *found.said.aliases)
    return (*names, *map(_negative, names)) if found.kind is bool else (*names, _argument(found.name))


def _meant(flag: str, value: Any) -> Any:
    return False if flag.startswith(NEGATIVE) else value


def _negative(flag: str) -> str:
    return NEGATIVE + flag


def _argument(flag: str) -> str:
    return f"{flag}-argument"


def _parameter(flag: str) -> str:
    return flag.replace("-", "_")


# -- what typer is told ------------------------------------------------------------------------------------------------
def _sign(command: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """typer reads both; keyword-only, because a flag with a default may come before one without."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}


def _context() -> Iterator[inspect.Parameter]:
    yield _keyword("ctx", typer.Context, inspect.Parameter.empty)
    yield _keyword("config", ConfigFlag, None)


def _positional(kind: type, name: str) -> Iterator[inspect.Parameter]:
    for found in settings_of(kind):
        if found.name == name:
            argument = typer.Argument(metavar=name.upper(), help=f"The same as --{name}.")
            yield _keyword(_parameter(_argument(name)), Annotated[found.kind | None, argument], None)


def _parameters(settings: tuple[Setting, ...]) -> Iterator[inspect.Parameter]:
    """What must be given comes first, so that help begins with it."""
    for found in sorted(settings, key=lambda each: each.said.panel != NEEDED):
        yield _keyword(found.key, Annotated[_type(found), _option(found)], _default(found))
        for flag in _spellings(found)[1:]:
            if flag != _argument(found.name):
                yield _keyword(_parameter(flag), Annotated[_type(found), _other(found, flag)], None)


def _option(found: Setting, variable: str | None = None) -> Any:
    return typer.Option(
        f"--{found.name}",
        help=found.said.help,
        rich_help_panel=found.said.panel,
        metavar=found.said.metavar or METAVARS.get(found.kind),
        envvar=variable,
        show_envvar=False,
    )


def _other(found: Setting, flag: str) -> Any:
    """Another spelling. Help shows the one that changes what is so by default, and no older names."""
    changes = found.default is True and flag == _negative(found.name)
    return typer.Option(
        f"--{flag}", hidden=not changes, help=f"Not --{found.name}.", rich_help_panel=found.said.panel, metavar=" "
    )


def _type(found: Setting) -> Any:
    """What may come as a text of another form, such as numbers parted by commas, `sources` reads, as in a variable."""
    if found.said.spelling is not None:
        return str | None
    if found.several:
        return str | None if found.kind is int else list[found.kind] | None  # type: ignore[name-defined]
    return found.kind | None


def _default(found: Setting) -> Any:
    """For help to show; whether it was given is another question."""
    return None if found.required or found.several or found.kind is bool else found.default


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
