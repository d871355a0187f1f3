"""What a gate on the router's cost allows a machine that is slower than the one that the bars were set on."""

import pytest

from bench.figures import figure_of
from bench.router_cost import ALLOWANCE_MAX, YARDSTICK_US, allowance, bar, for_this_machine, yardstick_us


@pytest.mark.parametrize(
    ("slower", "allowed"), [(0.5, 1.0), (1.0, 1.0), (1.25, 1.25), (1.5, 1.5), (4.0, ALLOWANCE_MAX)]
)
def test_a_slower_machine_is_allowed_for_and_a_faster_one_not_held_to_more(slower: float, allowed: float) -> None:
    assert allowance(slower * YARDSTICK_US) == pytest.approx(allowed)


def test_only_the_limit_of_the_gate_moves() -> None:
    figure = figure_of(bar(8, 250.0), [280.0], yardstick_us=1.2 * YARDSTICK_US)
    gated = for_this_machine(figure)
    assert (figure.passed, gated.passed) == (False, True)
    assert gated.bar.limit == pytest.approx(300.0)
    assert (figure.bar.limit, gated.value, gated.interval) == (250.0, figure.value, figure.interval)


async def test_the_yardstick_is_work() -> None:
    assert await yardstick_us() > 0
