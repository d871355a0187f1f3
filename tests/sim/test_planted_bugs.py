"""The virtual cluster finds each mistake that others shipped, and only the mistake: without it the same seed passes."""

from collections import Counter

import pytest

from engine.kv.allocator import IntegrityError
from tests.sim.history import Violation
from tests.sim.planted_bugs import BUGS, nobody_watches
from tests.sim.simulation import simulate_seed

SEEDS_MAX = 300


@pytest.mark.timeout(60)  # some show in few seeds, and another program may be using the machine
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str, figures: Counter[str]) -> None:
    with BUGS[name]():
        seed, violation = _first_violation()
    print(f"caught by {violation}")
    assert isinstance(violation.__cause__, (Violation, IntegrityError)), "a check must notice it, not a crash"
    simulate_seed(seed)
    figures["seeds until " + " ".join(name.split("_")[:2])] = seed + 1


def test_nobody_watching_is_no_bug_that_is_caught() -> None:
    """Lesson 8 is planted where nobody watches: that alone breaks no promise, so what is caught there is the lesson."""
    with nobody_watches():
        for seed in range(20):
            simulate_seed(seed)


def _first_violation() -> tuple[int, Violation]:
    for seed in range(SEEDS_MAX):
        try:
            simulate_seed(seed)
        except Violation as violation:
            return seed, violation
    pytest.fail(f"not noticed in {SEEDS_MAX} seeds")
