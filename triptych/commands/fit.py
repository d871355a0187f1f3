"""`triptych fit`: how long engine steps take on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from control_plane.options import MODEL_DEFAULT, Device, Dtype, EngineOptions
from engine.base import limits
from triptych.flags import option
from triptych.options import FitOptions, fit_engine, grid_of


def fit(
    model: Annotated[str, option(EngineOptions, "model")] = MODEL_DEFAULT,
    dtype: Annotated[Dtype, option(EngineOptions, "dtype")] = Dtype.AUTO,
    device: Annotated[Device, option(EngineOptions, "device")] = Device.CPU,
    threads: Annotated[int, typer.Option(help="Compute threads; as many as the worker will have.", metavar="N")] = 1,
    block_size: Annotated[int, option(EngineOptions, "block_size")] = limits.BLOCK_SIZE_TOKENS,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, a few times: seconds.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Longer contexts, larger batches: minutes.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: where workers of this machine look.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure how long engine steps take here and fit the model that schedules by it. Best on an idle machine.

    Of a model that sees, these are the steps of its language model.
    """
    options = FitOptions(
        engine=fit_engine(model=model, dtype=dtype, device=device, block_size=block_size),
        threads=threads,
        grid=grid_of(quick=quick, full=full),
        out=out,
        as_json=as_json,
    )
    from triptych.fit import main as run

    raise typer.Exit(run(options))
