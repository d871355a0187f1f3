"""`triptych config`: what a command would run with, and who says so; what a file of settings may hold."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.options import ServeOptions
from triptych.flags import configured_by
from triptych.settings import COMMANDS, Command

if TYPE_CHECKING:
    from triptych.sources import Configured, Found

config = typer.Typer(help="Show settings and where they come from.", no_args_is_help=True)


@config.command()
@configured_by(ServeOptions, positional="model")
def show(
    configured: "Configured[ServeOptions]",
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print a file that says the same.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every setting that `triptych serve` would run with, and its origin. Keys are not shown.

    \b
    triptych config show --config my.yaml --port 9000
    triptych config show --yaml > my.yaml
    """
    _ = configured.options  # a combination that cannot work is not shown as if it did
    found = list(configured.found.values())
    if as_json:
        typer.echo(json.dumps({f.setting.name: {"value": f.shown, "origin": str(f.origin)} for f in found}, indent=2))
    elif as_yaml:
        typer.echo("\n".join(map(_yaml_line, found)))
    elif sys.stdout.isatty():
        _print_table(found)
    else:
        typer.echo("\n".join(f"{f.setting.name}: {_text(f.shown)}  ({f.origin})" for f in found))


@config.command()
def schema(
    command: Annotated[Command, typer.Argument(help="The command whose file it is.")] = Command.SERVE,
) -> None:
    """Print the JSON schema of a file of settings, for editors that check while one types."""
    from triptych.sources import schema as written

    typer.echo(json.dumps(written(COMMANDS[command]), indent=2, ensure_ascii=False))


def _yaml_line(found: "Found") -> str:
    """A secret stands in a comment: a file that said `***` would make that the key, and an empty one is refused."""
    hidden = "# " if found.setting.said.secret else ""
    return f"{hidden}{found.setting.name}: {_text(found.shown)}  # {found.origin}"


def _text(value: Any) -> str:
    """One value on one line, as YAML writes it."""
    import yaml

    written: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return written.removesuffix("\n").removesuffix("\n...")


def _print_table(found: "list[Found]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("setting", "value", "origin"):
        table.add_column(column)
    for each in found:
        style = "dim" if each.origin.source == "default" else ""
        table.add_row(each.setting.name, Text(_text(each.shown), style), Text(str(each.origin), style))
    Console().print(table)
