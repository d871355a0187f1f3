"""Far more is asked than can be served, for real: what is accepted is in time, the rest is told to come back, and
nothing stays behind (reliability C6). As `bench.overload` measures it, in shorter phases."""

import httpx
import pytest

from bench import overload
from bench.cluster import cluster
from bench.figures import Figure
from tests.procs.harness import busy, wait_quiet

PHASE_S = 15.0
ALLOWANCE = 0.9  # of a bar is what must hold: a short phase has more of its ends, and neighbours take the processors


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_goodput_survives_overload_and_everybody_else_is_told_when_to_return() -> None:
    async with cluster(overload.ENGINE) as running:
        load = overload.Overload(running, PHASE_S)
        rounds = [await load.round() for _ in range(2)]
        async with httpx.AsyncClient() as client:
            quiet = await wait_quiet(client, running)
        figures = overload.figures_of(rounds)
    for figure in figures:
        print(figure)
    assert busy(quiet) == {}
    assert [str(figure) for figure in figures if not _holds(figure)] == []


def _holds(figure: Figure) -> bool:
    if figure.bar.at_least:
        return max(figure.interval) >= ALLOWANCE * figure.bar.limit
    return figure.passed
