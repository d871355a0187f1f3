"""`n` choices over real processes: one prefill, one transfer, and each choice's own right tokens (DESIGN 1)."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import httpx
import pytest

from deploy.local import LocalCluster
from engine.executors.oracle import reference_tokens
from engine.types import SamplingParams
from tests.procs.harness import (
    DEFAULT_ORACLE,
    Prompt,
    chunks,
    cluster,
    complete,
    metric,
    oracle_prompt,
    settle,
    until,
    wait_quiet,
    workers,
)

CHOICES = 4
SCOPES = {"one": "/one", "four": "/four"}  # of the tenant without a name: see `Submit.cache_scope`
LEAVERS = 24

Texts = dict[int, tuple[str, str | None]]
"""By index: the text, and how it ended."""


def warm_prompt(seed: int, *, prompt_tokens: int = 200, max_tokens: int = 40) -> Prompt:
    """One whose choices differ."""
    prompt = oracle_prompt(seed, prompt_tokens=(prompt_tokens, prompt_tokens), max_tokens=(max_tokens, max_tokens))
    return replace(prompt, sampling=replace(prompt.sampling, temperature=0.8))


def expected(prompt: Prompt, tenant: str = "", count: int = CHOICES) -> Texts:
    return {
        choice: (" ".join(map(str, reference(prompt.token_ids, tenant, prompt.sampling, choice))), "length")
        for choice in range(count)
    }


def reference(tokens: tuple[int, ...], tenant: str, sampling: SamplingParams, choice: int) -> tuple[int, ...]:
    return reference_tokens(tokens, tenant, sampling, sampling.max_tokens, DEFAULT_ORACLE, choice)


def texts(value: Mapping[str, Any]) -> Texts:
    """Of an answer in one piece."""
    return {choice["index"]: (choice["text"].strip(), choice["finish_reason"]) for choice in value["choices"]}


async def streamed(client: httpx.AsyncClient, running: LocalCluster, prompt: Prompt) -> Texts:
    """Every event's text put together, and each choice's one ending."""
    text: defaultdict[int, str] = defaultdict(str)
    finish: dict[int, str | None] = {}
    async for event in chunks(client, running, prompt.body(n=CHOICES)):
        for choice in event.get("choices", ()):
            assert finish.get(choice["index"]) is None, "text after the end"
            text[choice["index"]] += choice["text"]
            finish[choice["index"]] = choice["finish_reason"]
    return {index: (text[index].strip(), finish[index]) for index in sorted(text)}


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_four_choices_are_one_prefill_and_one_transfer() -> None:
    """Paired with one choice of the same prompt, in another tenant so that neither finds the other's KV."""
    prompt = warm_prompt(1)
    looked_up = [0.0]
    values: dict[str, dict[str, Any]] = {}
    async with cluster() as running, httpx.AsyncClient() as client:
        for name, count in (("one", 1), ("four", CHOICES)):
            values[name] = await complete(client, running, prompt.body(stream=False, n=count, cache_salt=name))
            await settle(client, running)
            looked_up.append(await metric(client, running, "triptych_prefix_cache_queries_total"))
    costs = {name: (value["triptych"]["kv_bytes_raw"], value["triptych"]["attempts"]) for name, value in values.items()}
    assert costs["one"] == costs["four"] == (len(prompt.token_ids) * DEFAULT_ORACLE.schema.token_bytes, 1)
    assert looked_up[2] - looked_up[1] == looked_up[1] - looked_up[0] > 0
    assert texts(values["one"]) == expected(prompt, SCOPES["one"], 1)
    assert texts(values["four"]) == expected(prompt, SCOPES["four"])
    assert len(set(texts(values["four"]).values())) == CHOICES
    assert values["four"]["usage"]["completion_tokens"] == CHOICES * prompt.sampling.max_tokens


@pytest.mark.procs
@pytest.mark.timeout(60)
@pytest.mark.parametrize("mixed", [0, 1])
async def test_streamed_choices_equal_those_in_one_piece(mixed: int) -> None:
    prompts = [warm_prompt(seed, prompt_tokens=1 + 17 * seed, max_tokens=1 + 9 * seed) for seed in range(8)]
    roles = {"prefill": 1 - mixed, "decode": 1 - mixed, "mixed": mixed}
    async with cluster(**roles) as running, httpx.AsyncClient() as client:
        whole = [complete(client, running, prompt.body(stream=False, n=CHOICES)) for prompt in prompts]
        in_parts = [streamed(client, running, prompt) for prompt in prompts]
        seen = [texts(value) for value in await asyncio.gather(*whole)], await asyncio.gather(*in_parts)
        await wait_quiet(client, running)
    wanted = list(map(expected, prompts))
    assert seen == (wanted, wanted)


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_all_four_finish_right_when_their_decode_worker_is_killed() -> None:
    """In the middle: after so many steps of decoding."""
    prompts = [warm_prompt(seed) for seed in range(8)]
    armed = {"decode-0": {"TRIPTYCH_FAILPOINTS": "decode.decoding=kill@20"}}
    async with cluster(prefill=1, decode=2, environments=armed) as running, httpx.AsyncClient() as client:
        seen = await asyncio.gather(*(streamed(client, running, prompt) for prompt in prompts))
        connected = [name for name, worker in (await workers(client, running)).items() if worker["connected"]]
        await wait_quiet(client, running)
    assert sorted(connected) == ["decode-1", "prefill-0"], "the failpoint was not reached"
    assert seen == list(map(expected, prompts))


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_a_client_that_leaves_takes_all_its_choices_along() -> None:
    async with cluster(prefill=2, decode=2) as running, httpx.AsyncClient() as client:

        async def leave(seed: int) -> None:
            events = chunks(client, running, warm_prompt(seed, max_tokens=1_000).body(n=CHOICES))
            async with contextlib.aclosing(events):
                for _ in range(seed):
                    await anext(events)

        await asyncio.gather(*map(leave, range(LEAVERS)))
        await settle(client, running)

        async def nobody() -> bool:
            return await metric(client, running, "triptych_requests_in_flight") == 0

        await until(nobody, lambda: "requests in flight")
