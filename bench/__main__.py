"""`make bench`: every figure that a bar is held to, one after the other, as a table. Rewrites bench/figures/*.json
and the README's table.

python -m bench                 all
python -m bench overlap ...     some
"""

import asyncio
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import engine_speed, images, overlap, overload, quality, quiet_engine, router_cost, stream_cost, wire
from bench.demo_vlm import evaluate as demo_vlm
from bench.figures import Figure, save
from bench.readme import README, refreshed

BENCHES: dict[str, Callable[[], Coroutine[Any, Any, list[Figure]]]] = {
    "demo_vlm": demo_vlm.measured,
    "engine_speed": engine_speed.measure,
    "images": images.measure,
    "overlap": overlap.measure,
    "overload": overload.measure,
    "quality": quality.measured_and_drawn,
    "quiet_engine": quiet_engine.measure,
    "router_cost": router_cost.measure,
    "stream_cost": stream_cost.measure,
    "wire": wire.measured,
}


def main(names: Sequence[str]) -> int:
    console = Console()
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        console.print(f"unknown: {', '.join(unknown)}; there are: {', '.join(BENCHES)}")
        return 2
    table = Table("figure", "value", "interval", "of", "bar", "")
    for name in names or BENCHES:
        console.print(f"measuring {name} ...")
        figures = asyncio.run(BENCHES[name]())
        save(name, figures)
        for figure in figures:
            table.add_row(*_row(figure))
    console.print(table)
    README.write_text(refreshed(README.read_text()))
    return 0


def _row(figure: Figure) -> tuple[str, ...]:
    low, high = figure.interval
    sign = ">=" if figure.bar.at_least else "<="
    return (
        figure.bar.name,
        f"{figure.value:.3g} {figure.bar.unit}",
        f"{low:.3g} .. {high:.3g}",
        str(figure.samples),
        f"{sign} {figure.bar.limit:g}",
        "ok" if figure.passed else "MISSED",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
