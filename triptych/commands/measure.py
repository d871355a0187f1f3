"""`triptych measure`: what codecs cost on somebody's own text."""

from pathlib import Path
from typing import Annotated

import typer

from control_plane.options import MODEL_DEFAULT, Dtype, EngineOptions
from triptych.flags import option
from triptych.options import MeasureOptions, codec_engine, split_levels, split_names

TEXT = "A UTF-8 file; with several, figures are of the worst one."
LEVELS = "Numbers separated by commas; default: those of the profile."


def measure(
    text: Annotated[list[Path], typer.Option(help=TEXT, metavar="FILE")],
    codecs: Annotated[str, typer.Option(help="Names separated by commas, or all.", metavar="NAMES")] = "all",
    levels: Annotated[str, typer.Option(help=LEVELS, metavar="N,N,...")] = "",
    model: Annotated[str, option(EngineOptions, "model")] = MODEL_DEFAULT,
    dtype: Annotated[Dtype, option(EngineOptions, "dtype")] = Dtype.AUTO,
    profile: Annotated[Path | None, option(EngineOptions, "profile")] = None,
    windows: Annotated[
        int, typer.Option(help="Stretches of 1,024 tokens taken from each text, at most.", metavar="N")
    ] = 4,
    threads: Annotated[int, typer.Option(help="Compute threads.", metavar="N")] = 2,
    out: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.", metavar="FILE")] = None,
) -> None:
    """Measure what codecs cost on a text: bits, KL, perplexity, encode and decode rates.

    Of a model that sees, its language model is measured.
    """
    options = MeasureOptions(
        engine=codec_engine(model=model, dtype=dtype, profile=profile),
        texts=tuple(text),
        codecs=split_names(codecs),
        levels=split_levels(levels),
        windows=windows,
        threads=threads,
        out=out,
    )
    from triptych.measure import main as run

    raise typer.Exit(run(options))
