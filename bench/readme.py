"""The README's table of measured figures, written from bench/figures/*.json between two markers. Never typed.

python -m bench.readme
"""

import json
from pathlib import Path
from typing import Any

from bench.figures import FOLDER

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- figures: written by `python -m bench.readme` -->", "<!-- end of figures -->"


def table() -> str:
    """One line per bar, in the order of the files' names; the machine below."""
    files = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]
    rows = [_row(figure) for file in files for figure in file["figures"]]
    machine = files[0]["machine"]
    where = f"{machine['cores']} cores of a shared {machine['cpu']}, no GPU, {machine['date']}; `make bench` on yours."
    return "\n".join(["| figure | value | 95 % interval | bar | |", "|---|---|---|---|---|", *rows, "", where])


def _row(figure: dict[str, Any]) -> str:
    bar, (low, high) = figure["bar"], figure["interval"]
    sign = ">=" if bar["at_least"] else "<="
    verdict = "" if figure["passed"] else "**missed**"
    value = f"{figure['value']:.3g} {bar['unit']}"
    return (
        f"| {bar['name']}: {bar['claim']} | {value} | {low:.3g} .. {high:.3g} | {sign} {bar['limit']:g} | {verdict} |"
    )


def refreshed(text: str) -> str:
    """The README with the current table in it."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(refreshed(README.read_text()))
