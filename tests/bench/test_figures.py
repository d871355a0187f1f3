"""What a figure says about its samples."""

import random
from statistics import median

import pytest

from bench.figures import Bar, figure_of, interval

AT_MOST = Bar(name="cost", claim="", unit="us", limit=2.0)
AT_LEAST = Bar(name="rate", claim="", unit="x", limit=2.0, at_least=True)


def test_the_interval_is_the_binomial_one() -> None:
    """Of 20 coins, five or fewer show heads with a chance of 2 %, six or fewer with 6 %: the 6th to the 15th."""
    assert interval([float(n) for n in range(1, 21)]) == (6.0, 15.0)
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)  # too few to leave one out


def test_the_interval_holds_the_true_median_as_often_as_it_claims() -> None:
    draw = random.Random(4)
    held = sum(low <= 0.5 <= high for low, high in (interval([draw.random() for _ in range(16)]) for _ in range(2_000)))
    assert held / 2_000 >= 0.94


@pytest.mark.parametrize(
    ("bar", "value", "passed"), [(AT_MOST, 2.0, True), (AT_MOST, 2.1, False), (AT_LEAST, 2.0, True)]
)
def test_a_bar_is_met_by_its_limit(bar: Bar, value: float, passed: bool) -> None:
    figure = figure_of(bar, [value - 1, value, value + 1])
    assert (figure.value, figure.passed) == (median([value - 1, value, value + 1]), passed)
