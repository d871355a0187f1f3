"""`triptych profile`: calibrate codecs to a model."""

from pathlib import Path
from typing import Annotated

import typer

from control_plane.options import MODEL_DEFAULT, Dtype, EngineOptions
from triptych.flags import option
from triptych.options import ProfileOptions, codec_engine

TEXT = "UTF-8 files of different kinds; default: those of the package."


def profile(
    model: Annotated[str, typer.Argument(help=f"Checkpoint directory or '{MODEL_DEFAULT}'.")] = MODEL_DEFAULT,
    text: Annotated[list[Path] | None, typer.Option(help=TEXT, metavar="FILE")] = None,
    dtype: Annotated[Dtype, option(EngineOptions, "dtype")] = Dtype.AUTO,
    windows: Annotated[int, typer.Option(help="Stretches of each text to calibrate on, at most.", metavar="N")] = 6,
    held_out: Annotated[int, typer.Option(help="Stretches at each text's end to measure on.", metavar="N")] = 2,
    threads: Annotated[int, typer.Option(help="Compute threads.", metavar="N")] = 2,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: MODEL.safetensors here.", metavar="FILE")
    ] = None,
) -> None:
    """Calibrate codecs to a model and measure them. Workers read the file with --profile.

    Of a model that sees, that is its language model, on texts: what images leave in KV is not in the profile.
    """
    from triptych.profile import default_out, default_texts
    from triptych.profile import main as run

    options = ProfileOptions(
        engine=codec_engine(model=model, dtype=dtype),
        texts=tuple(text or default_texts()),
        out=out or default_out(model),
        windows=windows,
        held_out=held_out,
        threads=threads,
    )
    raise typer.Exit(run(options))
