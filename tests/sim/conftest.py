"""What the virtual cluster's tests did, added up and shown at the end of the run."""

from collections import Counter
from collections.abc import Iterator

import pytest

FIGURES = pytest.StashKey[Counter[str]]()
LABEL_WIDTH = 28
COLUMNS = 3


@pytest.fixture
def figures(pytestconfig: pytest.Config) -> Counter[str]:
    """Add to it: it is printed after the last test."""
    return pytestconfig.stash.setdefault(FIGURES, Counter())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash.get(FIGURES, Counter[str]())
    if figures:
        milliseconds = figures.pop("milliseconds", 0)
        terminalreporter.section("virtual cluster")
        for line in table(figures):
            terminalreporter.write_line(line)
        if milliseconds:
            rate, speed = (figures[name] * 1_000 / milliseconds for name in ("seeds", "virtual seconds"))
            terminalreporter.write_line(f"{rate:.1f} seeds a second, {speed:.0f} times faster than the clock")


def table(figures: Counter[str]) -> Iterator[str]:
    """Names and counts, down the columns."""
    cells = [f"{name:<{LABEL_WIDTH}}{count:>9}" for name, count in sorted(figures.items())]
    rows = -(-len(cells) // COLUMNS)
    for row in range(rows):
        yield "   ".join(cells[row::rows])
