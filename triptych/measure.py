"""`triptych measure`: what codecs cost on given texts, in a table and as JSON that scripts rely on.

Windows are taken from all over each text. With several texts a figure is that of the worst one, as in a profile.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from control_plane.codec_choice import choose_codecs
from control_plane.model_choice import ModelChoice, choose_model
from control_plane.options import OptionError
from engine.base.blas import use_calling_thread
from engine.base.errors import NotFound
from engine.base.files import replace_file, require_writable
from engine.models.info import describe
from kv_transfer.codecs import CodecSet, codecs
from kv_transfer.profile import Point
from triptych.curves import Level, Text, levels_of, measure, read_texts, spread, work_of
from triptych.options import MeasureOptions

_SHOWN_MB_S_MAX = 1e5  # beyond, nothing was done: a view of memory


def main(options: MeasureOptions) -> int:
    with progress_bar() as bars:
        choice = choose_model(options.engine, progress=bars.console.print)
        points = run(options, choice, bars)
    Console().print(table_of(points))
    return 0


def run(options: MeasureOptions, choice: ModelChoice, bars: Progress) -> Mapping[str, Sequence[Point]]:
    """Measure and write. Whatever can be refused is refused before the model is loaded."""
    assert choice.path is not None, "options refuse models without weights"
    offered = choose_codecs(options.engine, choice.schema)
    wanted = wanted_levels(options, offered)
    texts = [
        replace(text, windows=spread(text.windows, options.windows))
        for text in read_texts(options.texts, choice.path, describe(choice.path))
    ]
    if options.out is None:
        return _measured(options, choice, offered, texts, wanted, bars)
    with writing("json", options.out):
        require_writable(options.out)
    points = _measured(options, choice, offered, texts, wanted, bars)
    with writing("json", options.out):
        replace_file(options.out, json.dumps(as_document(points), indent=2).encode() + b"\n")
    return points


def _measured(
    options: MeasureOptions,
    choice: ModelChoice,
    offered: CodecSet,
    texts: Sequence[Text],
    wanted: Sequence[Level],
    bars: Progress,
) -> dict[str, list[Point]]:
    from engine.capture import Subject

    use_threads(options.threads)
    assert choice.path is not None
    task = bars.add_task("loading", total=work_of(texts, wanted))
    subject = Subject.load(choice.path)
    return measure(subject, offered, texts, wanted, lambda what: bars.update(task, description=what, advance=1))


def wanted_levels(options: MeasureOptions, offered: CodecSet) -> list[Level]:
    for name in options.codecs:
        _require_offered(name, offered)
    names = options.codecs or offered.names()
    if not options.levels:
        return levels_of(offered, names)
    levels = [Level(name, level) for name in names for level in options.levels if level in offered.get(name).levels]
    if {level for _, level in levels} != set(options.levels):
        known = "; ".join(f"{name}: {_span(offered.get(name).levels)}" for name in names)
        raise OptionError("levels", f"{', '.join(map(str, options.levels))}: not each is a level of a codec ({known})")
    return levels


def _require_offered(name: str, offered: CodecSet) -> None:
    if name in offered.names():
        return
    try:
        profiled = codecs.get(name).profiled
    except NotFound as error:
        raise OptionError("codecs", error.message) from error
    if profiled:
        raise OptionError(
            "codecs",
            f"'{name}' needs a profile of this model: `triptych profile` makes one, --profile names it",
        )
    raise OptionError("codecs", f"'{name}' does not take KV in {offered.stream.dtype}")


def _span(levels: Sequence[int]) -> str:
    return f"{levels[0]}" if len(levels) == 1 else f"{min(levels)} to {max(levels)}"


# -- output ------------------------------------------------------------------------------------------------------------
def as_document(points: Mapping[str, Sequence[Point]]) -> list[dict[str, Any]]:
    """Relied on by scripts: exactly these keys."""
    return [
        {
            "codec": codec,
            "level": point.level,
            "bits_per_element": point.bits_per_element,
            "kl": point.kl,
            "ppl_change": point.ppl_change,
            "encode_mb_s": point.encode_mb_s,
            "decode_mb_s": point.decode_mb_s,
        }
        for codec, of_codec in points.items()
        for point in of_codec
    ]


def table_of(points: Mapping[str, Sequence[Point]]) -> Table:
    table = Table("codec")
    for column in ("level", "bits/number", "KL, nats/token", "perplexity", "encode MB/s", "decode MB/s"):
        table.add_column(column, justify="right")
    for codec, of_codec in points.items():
        for point in of_codec:
            table.add_row(
                codec,
                str(point.level),
                f"{point.bits_per_element:.2f}",
                f"{point.kl:.4f}",
                f"{point.ppl_change:+.2%}",
                *map(_rate, (point.encode_mb_s, point.decode_mb_s)),
            )
    return table


def _rate(mb_s: float) -> str:
    return f"{mb_s:,.0f}" if mb_s < _SHOWN_MB_S_MAX else "-"


# -- what `profile` shares ---------------------------------------------------------------------------------------------
@contextmanager
def progress_bar() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield bars


@contextmanager
def writing(option: str, out: Path) -> Iterator[None]:
    """For what writes that file and nothing else: other trouble is not the option's."""
    try:
        yield
    except OSError as error:
        raise OptionError(option, f"'{out}' cannot be written: {error.strerror or error}") from error


def use_threads(threads: int) -> None:
    """Of the model. Codecs run on one, as a codec thread would run them."""
    import torch

    torch.set_num_threads(threads)
    use_calling_thread()
