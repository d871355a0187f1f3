"""More running sequences than KV memory, in real processes: some give way, and all end right (DESIGN 1)."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import pytest

from deploy.local import LocalCluster
from tests.procs.harness import ORACLE, Prompt, ask, cluster, complete, metric, oracle_prompt, settle, until, verdict

TINY = replace(ORACLE, kv_cache_mib=1)  # 8,192 tokens
PREEMPTIONS = "triptych_num_preemptions_total"


def long_answers(count: int) -> list[Prompt]:
    """Their prompts fit together; their answers do not."""
    return [oracle_prompt(seed, prompt_tokens=(100, 200), max_tokens=(700, 900)) for seed in range(count)]


async def ask_at_once(running: LocalCluster, prompts: Sequence[Prompt]) -> Counter[str]:
    async with httpx.AsyncClient() as client:
        answers = await asyncio.gather(*(ask(client, running.url, prompt) for prompt in prompts))
    return Counter(map(verdict, prompts, answers))


@pytest.mark.procs
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "roles",
    [{"prefill": 0, "decode": 0, "mixed": 1}, pytest.param({"prefill": 1, "decode": 2}, marks=pytest.mark.slow)],
    ids=str,
)
async def test_preempted_requests_end_right(roles: dict[str, Any]) -> None:
    """Computed again where they were, or moved with their KV from one decode worker to the other."""
    prompts = long_answers(14 * max(1, roles["decode"]))
    async with cluster(engine=TINY, **roles) as running, httpx.AsyncClient() as client:
        assert await ask_at_once(running, prompts) == {"right": len(prompts)}
        await settle(client, running)
        assert await metric(client, running, PREEMPTIONS) > 0


async def is_there(client: httpx.AsyncClient, running: LocalCluster, count: int) -> bool:
    return await metric(client, running, "triptych_requests_in_flight") >= count


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_the_more_urgent_overtakes_those_that_wait() -> None:
    """Paired: two requests come last, alike but for their priority; a queue stands before both."""
    crowd, (urgent, patient) = long_answers(24), long_answers(26)[24:]
    ended: list[str] = []

    async def run(client: httpx.AsyncClient, running: LocalCluster, name: str, prompt: Prompt, priority: int) -> None:
        value = await complete(client, running, prompt.body(stream=False, priority=priority))
        text = value["choices"][0]["text"]
        ended.append(name if tuple(map(int, text.split())) == prompt.expected else "wrong")

    async with (
        cluster(engine=TINY, prefill=0, decode=0, mixed=1) as running,
        httpx.AsyncClient() as client,
        asyncio.TaskGroup() as group,
    ):
        for prompt in crowd:
            group.create_task(run(client, running, "crowd", prompt, 0))
        await until(partial(is_there, client, running, len(crowd)), lambda: "the crowd is not there")
        group.create_task(run(client, running, "patient", patient, 0))
        group.create_task(run(client, running, "urgent", urgent, -1))
    assert Counter(ended) == {"crowd": len(crowd), "patient": 1, "urgent": 1}
    assert ended.index("urgent") < len(crowd) // 2 < ended.index("patient")
