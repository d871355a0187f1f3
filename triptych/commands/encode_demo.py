"""`triptych encode-demo`: pictures with questions and right answers, which the demo model was not trained on."""

from pathlib import Path
from typing import Annotated

import typer


def encode_demo(
    out: Annotated[Path, typer.Option(help="Folder to write to; made if it is not there.", metavar="DIR")],
    count: Annotated[int, typer.Option(help="How many pictures.", metavar="N")] = 20,
    seed: Annotated[int, typer.Option(help="Which ones: the same seed draws the same.", metavar="N")] = 0,
) -> None:
    """Write generated pictures and items.json: for each its file, a question, the right answer and its kind.

    \b
    triptych encode-demo --count 100 --seed 1 --out pictures
    """
    from triptych.demo.command import DemoOptions, run

    raise typer.Exit(run(DemoOptions(count=count, seed=seed, out=out)))
