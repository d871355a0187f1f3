"""Promises I1 to I5 under seeded faults, and that a seed is all it takes to see a run again."""

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.sim.simulation import simulate_seed

pytestmark = pytest.mark.timeout(90)  # twenty seeds take five seconds, four times as long beside other programs

SEEDS, SLOW_SEEDS, BATCH = 120, 1_200, 20
ROOT = Path(__file__).resolve().parents[2]


@cache
def figures_of(seed: int) -> Counter[str]:
    """What a run did that kept its promises. The same whenever it is run, so once is enough."""
    return simulate_seed(seed).figures


def batches(start: int, end: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("first", range(start, end, BATCH), ids=lambda first: f"seed {first} on")


@batches(0, SEEDS)
def test_promises_hold_whatever_breaks(first: int, figures: Counter[str]) -> None:
    started_s = time.perf_counter()
    for seed in range(first, first + BATCH):
        figures.update(figures_of(seed))
        figures["seeds"] += 1
    figures["milliseconds"] += round(1_000 * (time.perf_counter() - started_s))


@pytest.mark.slow
@batches(SEEDS, SLOW_SEEDS)
def test_promises_hold_for_more_seeds(first: int, figures: Counter[str]) -> None:
    test_promises_hold_whatever_breaks(first, figures)


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_gives_the_same_run_twice(seed: int) -> None:
    first, second = (simulate_seed(seed, recording=True).log for _ in range(2))
    assert first == second
    assert len(first) > 1_000


def test_a_seed_gives_the_same_run_in_every_process() -> None:
    """Nothing depends on the order of a set, nor on an address, nor on what ran before."""
    code = "from tests.sim.test_virtual_cluster import log_digest; print(log_digest(7))"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs == [f"{log_digest(7)}\n"] * 2


def log_digest(seed: int) -> str:
    return hashlib.sha256("\n".join(simulate_seed(seed, recording=True).log).encode()).hexdigest()


def test_faults_of_every_kind_happen_and_do_harm(figures: Counter[str]) -> None:
    """Else the seeds above prove little. Counted over a few of them; the whole table is printed at the end."""
    happened: Counter[str] = Counter()
    for seed in range(40):
        happened.update(figures_of(seed))
    expected = {
        *("kill", "freeze", "cut", "reset", "drain", "forget", "ambush", "restarts", "relocations", "placements lost"),
        *("forget", "preemptions", "requests of several choices", "choices stopped"),
        *("prompt tokens cached", "prompt tokens skipped", "prompt tokens scored"),
        *("images", "images cached", "failpoint prefill.gathering"),
        *("control double", "control overtake", "control delay", "damaged frames refused"),
        *(f"frame {kind}" for kind in ("drop", "duplicate", "overtake", "delay", "damage")),
        *("requests of several choices", "choices stopped", "preemptions"),
        *(f"prompt tokens {what}" for what in ("scored", "cached", "skipped")),
        *(f"ended {how}" for how in ("length", "stop", "cancelled", "deadline_exceeded", "internal", "lost")),
    }
    assert not expected - {kind for kind, count in happened.items() if count}
