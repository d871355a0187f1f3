"""1,000 requests over real processes, 200 of them left by their clients at random points: nothing stays behind
(reliability C7, C8; promises I3, I7)."""

import asyncio
import random
from collections import Counter

import httpx
import pytest

from deploy.local import LocalCluster
from tests.procs.harness import Answer, ask, cluster, holdings, oracle_prompt, verdict, wait_quiet, workers

REQUESTS = 1_000
LEAVERS = 200
CLIENTS = 32
LEAVE_WITHIN_S = 0.25


async def ask_or_leave(client: httpx.AsyncClient, running: LocalCluster, seed: int, *, leaves: bool) -> str:
    """The verdict on a whole answer, or on the part that a leaver had seen."""
    prompt = oracle_prompt(seed)
    draw = random.Random(seed)
    if not leaves:
        return verdict(prompt, await ask(client, running.url, prompt))
    answer = Answer()
    try:
        async with asyncio.timeout(draw.uniform(0.0, LEAVE_WITHIN_S)):
            answer = await ask(client, running.url, prompt, leave_after_chunks=draw.randint(0, 20))
    except TimeoutError:
        pass
    return "wrong" if verdict(prompt, answer) == "wrong" else "left"


async def tasks_by_process(client: httpx.AsyncClient, running: LocalCluster) -> dict[str, int]:
    return {name: worker["tasks"] for name, worker in (await workers(client, running)).items()}


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_nothing_is_left_after_a_thousand_requests_and_two_hundred_cancels() -> None:
    leavers = set(random.Random(0).sample(range(REQUESTS), LEAVERS))
    turns = asyncio.Semaphore(CLIENTS)

    async def one(client: httpx.AsyncClient, seed: int) -> str:
        async with turns:
            return await ask_or_leave(client, running, seed, leaves=seed in leavers)

    async with (
        cluster(prefill=2, decode=2) as running,
        httpx.AsyncClient(limits=httpx.Limits(max_connections=CLIENTS)) as client,
    ):
        await one(client, REQUESTS)  # links and threads exist from here on
        await wait_quiet(client, running)
        before = await tasks_by_process(client, running)
        verdicts = Counter(await asyncio.gather(*(one(client, seed) for seed in range(REQUESTS))))
        seen = await wait_quiet(client, running)
        print(f"{dict(verdicts)}; left behind: { {name: holdings(worker) for name, worker in seen.items()} }")
        assert verdicts["right"] == REQUESTS - LEAVERS
        assert verdicts["left"] == LEAVERS
        assert {name: holdings(worker) for name, worker in seen.items() if any(holdings(worker).values())} == {}
        after = await tasks_by_process(client, running)
        assert max(after[name] - before[name] for name in before) <= 2 * 4, "tasks left behind (each new link has 2)"
        metrics = (await client.get(f"{running.admin_url}/metrics")).text
        assert "\ntriptych_requests_in_flight 0.0" in metrics
