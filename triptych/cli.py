"""The `triptych` command: which commands there are, and how a mistake at the terminal is told.

    triptych/commands/    a file per command
    triptych/settings     what may be set;  `flags` makes the command line of it, `sources` merges files and variables

Exit statuses are in `statuses`; what the person at the terminal can mend is told in one line that names it. A traceback
means a bug of ours.
"""

import errno
import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from control_plane.options import OptionError
from engine.base.errors import TriptychError
from triptych.commands.bench import bench
from triptych.commands.chat import chat
from triptych.commands.config import config
from triptych.commands.controller import controller
from triptych.commands.encode_demo import encode_demo
from triptych.commands.fit import fit
from triptych.commands.measure import measure
from triptych.commands.methods import methods
from triptych.commands.profile import profile
from triptych.commands.router import router
from triptych.commands.serve import serve
from triptych.commands.worker import worker
from triptych.mistakes import ConfigError
from triptych.statuses import FAILED, INTERRUPTED, MISTAKE

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # the disk's trouble, wherever the bytes were to go

SERVING = "Serving"
LOOKING = "Asking and looking"
PREPARING = "Measuring and preparing"
COMMANDS: Mapping[str, tuple[Callable[..., None], ...]] = {
    SERVING: (serve, router, worker, controller),
    LOOKING: (chat, methods),
    PREPARING: (fit, measure, profile, encode_demo),
}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"triptych {importlib.metadata.version('triptych')}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the command itself."""


def _build() -> typer.Typer:
    app = typer.Typer(
        name="triptych",
        help="Serve language models from separate prefill and decode workers, with KV streamed between them.",
        callback=_root,
        no_args_is_help=True,
        pretty_exceptions_enable=False,  # it prints local variables: prompts and tokens do not belong on a terminal
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for panel, commands in COMMANDS.items():
        for command in commands:
            app.command(rich_help_panel=panel)(command)
    app.add_typer(bench, name="bench", rich_help_panel=PREPARING)
    app.add_typer(config, name="config", rich_help_panel=LOOKING)
    return app


app = _build()


def main() -> None:
    """The entry point. Mistakes of the person at the terminal become one line, not a traceback."""
    try:
        _tell_mistakes(app)
    finally:
        _flush()


def _tell_mistakes(run: Callable[[], object]) -> None:
    try:
        run()
    except ConfigError as error:
        _end(MISTAKE, *error.lines)
    except OptionError as error:
        _end(MISTAKE, f"--{error.option}: {error}")
    except TriptychError as error:
        _end(FAILED, error.message)
    except KeyboardInterrupt:  # outside of a command; within one, typer does the same
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        _tell_trouble_with_files(error)


def _tell_trouble_with_files(error: OSError) -> None:
    if error.filename is not None:
        _end(MISTAKE, f"{error.filename}: {error.strerror}")
    if error.errno not in UNWRITABLE:  # not about a file that somebody named
        raise error
    _discard_output()
    _end(FAILED, f"cannot write: {error.strerror}")


def _end(status: int, *lines: str) -> None:
    for line in lines:
        typer.secho(f"triptych: {line}", err=True, fg="red")
    raise SystemExit(status) from None


def _flush() -> None:
    """Now and not at exit, where Python would complain: whoever read our output may have read enough and gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _tell_trouble_with_files(error)


def _discard_output() -> None:
    """What is left of it too: Python would try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
