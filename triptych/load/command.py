"""`triptych bench serve`: progress on standard error, figures on standard output, JSON in a file."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from control_plane.options import OptionError
from engine.base.files import replace_file, require_writable
from triptych.load.clock import utc_now
from triptych.load.measurement import Measured, ServerTrouble, measure
from triptych.load.options import LoadOptions
from triptych.load.report import document, show
from triptych.load.samples import Sample
from triptych.statuses import FAILED, INTERRUPTED


def run(options: LoadOptions) -> int:
    """The exit status: 0 if anything was answered. Raises `OptionError`."""
    errors = Console(stderr=True)
    if options.out is not None:
        with _writing(options.out):
            require_writable(options.out)
    try:
        with _progress(errors, options.requests) as advance:
            measured = asyncio.run(measure(options, on_sample=advance))
    except ServerTrouble as trouble:
        errors.print(str(trouble), markup=False, highlight=False, soft_wrap=True)
        return FAILED
    except KeyboardInterrupt:  # before the first request that counts
        return INTERRUPTED
    show(measured.values, Console())
    if options.out is not None:
        _write(options.out, options, measured)
    if measured.interrupted:
        errors.print("interrupted: requests in flight are in no figure", style="yellow")
        return INTERRUPTED
    return 0 if measured.values["completed"] else FAILED


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[Sample], None]]:
    """Nothing where nobody watches."""
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=total)
        yield lambda sample: bars.advance(task)


def _write(out: Path, options: LoadOptions, measured: Measured) -> None:
    values = document(options, measured.model, measured.values, utc_now())
    with _writing(out):
        replace_file(out, json.dumps(values, indent=2).encode() + b"\n")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError("result-filename", f"'{out}' cannot be written: {error.strerror or error}") from error
