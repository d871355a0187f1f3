"""1,000 requests over real processes, 200 of them left by their clients at random points: nothing stays behind
(reliability C7, C8; promises I3, I7)."""

import asyncio
import random
from collections import Counter
from collections.abc import Mapping

import httpx
import pytest

from deploy.local import LocalCluster
from tests.procs.harness import Answer, ask, cluster, metric, oracle_prompt, settle, until, verdict, wait_quiet, workers

REQUESTS = 1_000
LEAVERS = 200
WARM_UP = 64  # links between all workers, and threads, exist from here on
CLIENTS = 32
LEAVE_WITHIN_S = 0.25
ROUTER_TASKS = "triptych_asyncio_tasks"


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
    tasks = {name: int(worker["tasks"]) for name, worker in (await workers(client, running)).items()}
    return tasks | {"router": int(await metric(client, running, ROUTER_TASKS))}


async def settled_tasks(client: httpx.AsyncClient, running: LocalCluster) -> dict[str, int]:
    await settle(client, running)
    return await tasks_by_process(client, running)


async def check_tasks(client: httpx.AsyncClient, running: LocalCluster, before: Mapping[str, int]) -> None:
    """As many as before: the tasks of a client that has left end a moment later."""
    more: dict[str, int] = {}

    async def gone() -> bool:
        nonlocal more
        now = await tasks_by_process(client, running)
        more = {name: now[name] - before[name] for name in before if now[name] > before[name]}
        return not more

    await until(gone, lambda: f"tasks left behind: {more}, before: {before}")


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
        await asyncio.gather(*(one(client, REQUESTS + seed) for seed in range(WARM_UP)))
        before = await settled_tasks(client, running)
        verdicts = Counter(await asyncio.gather(*(one(client, seed) for seed in range(REQUESTS))))
        await wait_quiet(client, running)
        print(f"{dict(verdicts)}; tasks when quiet: {before}")
        assert verdicts["right"] == REQUESTS - LEAVERS
        assert verdicts["left"] == LEAVERS
        await check_tasks(client, running, before)
        assert await metric(client, running, "triptych_requests_in_flight") == 0
