"""`triptych methods`: what there is to choose from for --codec and --batching, plug-ins of other packages included."""

import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from engine.base.registry import Registry
from engine.batching import batchings
from kv_transfer.codecs import codecs
from triptych.mistakes import ConfigError, nearest

KINDS: tuple[tuple[str, Registry[Any]], ...] = (("codec", codecs), ("batching", batchings))


@dataclass(frozen=True, slots=True)
class Method:
    """What a plug-in says of itself."""

    kind: str
    name: str
    loses: str
    needs: tuple[str, ...]
    paper: str


def methods(
    name: Annotated[str | None, typer.Argument(help="Tell all about this one.", metavar="NAME")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List codecs and batching methods: what each loses, needs, and which paper it is from.

    \b
    triptych methods
    triptych methods sarathi      how it works here, and where it differs from its paper
    """
    found = [method for method in _methods() if name in (None, method.name)]
    if not found:
        raise ConfigError(f"methods: there is no '{name}'{nearest(name or '', [m.name for m in _methods()])}")
    if as_json:
        typer.echo(json.dumps([asdict(method) for method in found], indent=2, ensure_ascii=False))
    elif name is not None:
        typer.echo("\n\n".join(map(_told, found)))
    elif sys.stdout.isatty():
        _print_table(found)
    else:
        typer.echo("\n".join(f"{m.kind:<9} {m.name:<11} {m.loses}  ({m.paper})" for m in found))


def _methods() -> Iterator[Method]:
    for kind, registry in KINDS:
        for name in registry.names():
            plugin = registry.get(name)
            yield Method(kind, name, plugin.loses, tuple(plugin.needs), plugin.paper)


def _told(method: Method) -> str:
    """The module's docstring is where a method is explained; the class's is one line."""
    plugin = dict(KINDS)[method.kind].get(method.name)
    text = inspect.getdoc(inspect.getmodule(plugin)) or inspect.getdoc(plugin) or "It says nothing of itself."
    needs = ", ".join(method.needs) or "nothing"
    facts = f"paper   {method.paper}\nloses   {method.loses}\nneeds   {needs}"
    return f"{method.kind} {method.name}\n\n{text}\n\n{facts}"


def _print_table(found: list[Method]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("kind", "name", "loses", "paper"):
        table.add_column(column, no_wrap=column in ("kind", "name"))
    for method in found:
        table.add_row(method.kind, f"[bold]{method.name}[/]", method.loses, method.paper)
    Console().print(table)
