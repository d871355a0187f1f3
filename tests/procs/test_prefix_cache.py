"""A conversation's second turn costs its new tokens only, in real processes; tenants share nothing (DESIGN 4).

    turn 1    prompt ------------------------------| answer       P has the prompt's KV, D the prompt's and the answer's
    turn 2    prompt ------------------------------| answer | message

So P computes answer and message, D is sent the message alone, and each has one block more to do at most.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from control_plane.model_choice import choose_model
from control_plane.options import Dtype, EngineOptions
from deploy.local import LocalCluster
from engine.base import limits
from engine.executors.oracle import reference_tokens
from engine.types import SamplingParams
from tests.procs.harness import DEFAULT_ORACLE, ORACLE, cluster, complete, metric, workers

PROMPT, ANSWER, MESSAGE = 1_000, 32, 40  # tokens
BLOCK = limits.BLOCK_SIZE_TOKENS
CONVERSATIONS = 6


@dataclass(frozen=True)
class Turn:
    """One question and its answer, and what they cost."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    cached: int  # tokens, as in `computed` and `sent`
    sent: float
    prefill: str
    decode: str

    @property
    def computed(self) -> int:
        return len(self.prompt) - self.cached

    def then(self, seed: int) -> tuple[int, ...]:
        """The next turn's prompt."""
        return (*self.prompt, *self.answer, *random_tokens(seed, MESSAGE))


def random_tokens(seed: int, count: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(DEFAULT_ORACLE.vocab_size) for _ in range(count))


async def ask(
    client: httpx.AsyncClient,
    running: LocalCluster,
    prompt: Sequence[int],
    token_bytes: int = DEFAULT_ORACLE.schema.token_bytes,
    **fields: Any,
) -> Turn:
    greedy = {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    value = await complete(client, running, {**greedy, **fields})
    stats = value["triptych"]
    cached = value["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == stats["cached_tokens"]
    return Turn(
        prompt=tuple(prompt),
        answer=tuple(value["choices"][0]["token_ids"]),
        cached=cached,
        sent=stats["kv_bytes_raw"] / token_bytes,
        prefill=stats["prefill_worker"],
        decode=stats["decode_worker"],
    )


def oracle_answer(prompt: Sequence[int], tenant: str = "") -> tuple[int, ...]:
    return reference_tokens(prompt, tenant, SamplingParams(temperature=0.0), ANSWER, DEFAULT_ORACLE)


# -- two turns ---------------------------------------------------------------------------------------------------------
@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_the_second_turn_computes_and_sends_its_new_tokens_and_at_most_one_block() -> None:
    async with cluster() as running, httpx.AsyncClient() as client:
        first = await ask(client, running, random_tokens(1, PROMPT))
        second = await ask(client, running, first.then(2))
        hits = await metric(client, running, "triptych_prompt_tokens_cached_total")
    assert (first.computed, first.sent) == (PROMPT, PROMPT)
    assert second.computed <= ANSWER + MESSAGE + BLOCK
    assert 0 < second.sent <= MESSAGE + BLOCK
    assert hits == second.cached
    assert [first.answer, second.answer] == [oracle_answer(turn.prompt) for turn in (first, second)]


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_one_mixed_worker_has_the_answer_too_and_sends_nothing() -> None:
    async with cluster(prefill=0, decode=0, mixed=1) as running, httpx.AsyncClient() as client:
        first = await ask(client, running, random_tokens(1, PROMPT))
        second = await ask(client, running, first.then(2))
    assert first.computed == PROMPT
    assert second.computed <= MESSAGE + BLOCK
    assert first.sent == second.sent == 0
    assert [first.answer, second.answer] == [oracle_answer(turn.prompt) for turn in (first, second)]


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_without_a_cache_every_turn_is_the_first() -> None:
    engine = EngineOptions(**{name: getattr(ORACLE, name) for name in ("model", "executor")}, prefix_cache=False)
    async with cluster(engine=engine) as running, httpx.AsyncClient() as client:
        first = await ask(client, running, random_tokens(1, PROMPT))
        second = await ask(client, running, first.then(2))
    assert (first.cached, second.cached) == (0, 0)
    assert second.sent == len(second.prompt)
    assert second.answer == oracle_answer(second.prompt)


# -- tenants, reset ----------------------------------------------------------------------------------------------------
@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_a_tenant_reuses_its_own_prompt_and_nobody_elses() -> None:
    """Paired: the same prompt by a, by a again, by b, and by somebody without a salt."""
    prompt = random_tokens(1, PROMPT)
    whole = PROMPT - PROMPT % BLOCK
    async with cluster() as running, httpx.AsyncClient() as client:
        turns = [await ask(client, running, prompt, cache_salt=salt) for salt in ("a", "a", "b", "b", None)]
    assert [turn.cached for turn in turns] == [0, whole, 0, whole, 0]
    assert [turn.sent for turn in turns] == [PROMPT, PROMPT - whole, PROMPT, PROMPT - whole, PROMPT]
    tenants = ("/a", "/a", "/b", "/b", "")  # as `Submit.cache_scope` has them
    assert [turn.answer for turn in turns] == [oracle_answer(prompt, tenant) for tenant in tenants]


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_reset_prefix_cache_empties_it_everywhere() -> None:
    prompt = random_tokens(1, PROMPT)
    async with cluster() as running, httpx.AsyncClient() as client:
        before = [await ask(client, running, prompt) for _ in range(2)]
        assert (await client.post(f"{running.admin_url}/reset_prefix_cache")).status_code == httpx.codes.OK
        after = [await ask(client, running, prompt) for _ in range(2)]
    for cold, warm in (before, after):
        assert (cold.cached, cold.sent) == (0, PROMPT)
        assert warm.cached > 0
        assert warm.sent < BLOCK
    assert {turn.answer for turn in (*before, *after)} == {oracle_answer(prompt)}


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_a_reset_beside_running_requests_takes_nothing_from_them() -> None:
    prompts = [random_tokens(seed % 3, PROMPT) for seed in range(24)]  # many share a prefix that is being forgotten
    async with cluster() as running, httpx.AsyncClient() as client:
        asked = asyncio.gather(*(ask(client, running, prompt) for prompt in prompts))
        while not asked.done():
            await client.post(f"{running.admin_url}/reset_prefix_cache")
            await asyncio.sleep(0.02)
        answers = [turn.answer for turn in await asked]
    assert answers == [oracle_answer(prompt) for prompt in prompts]


# -- placement ---------------------------------------------------------------------------------------------------------
@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_the_second_turn_goes_where_the_prefix_is() -> None:
    """Conversations that began side by side, on both workers of each kind. One at a time, as load alone would send all
    of them to the same one, they go on where they were."""
    async with cluster(prefill=2, decode=2) as running, httpx.AsyncClient() as client:
        prompts = [random_tokens(seed, PROMPT) for seed in range(CONVERSATIONS)]
        firsts = await asyncio.gather(*(ask(client, running, prompt) for prompt in prompts))
        assert len(await workers(client, running)) == 4
        seconds = [await ask(client, running, turn.then(100)) for turn in firsts]
    assert len({turn.prefill for turn in firsts}) == len({turn.decode for turn in firsts}) == 2
    places = [[(turn.prefill, turn.decode) for turn in turns] for turns in (firsts, seconds)]
    assert places[0] == places[1]
    assert max(turn.computed for turn in seconds) <= ANSWER + MESSAGE + BLOCK
    assert max(turn.sent for turn in seconds) <= MESSAGE + BLOCK


# -- the real model ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.procs
@pytest.mark.model
@pytest.mark.timeout(120)
async def test_real_weights_answer_the_second_turn_as_without_a_cache(model_dir: Path) -> None:
    engine = EngineOptions(model=str(model_dir), dtype=Dtype.FLOAT32, kv_cache_mib=128)
    token_bytes = choose_model(engine).schema.token_bytes
    async with cluster(engine=engine) as running, httpx.AsyncClient() as client:
        first = await ask(client, running, random_tokens(1, 200), token_bytes, max_tokens=8)
        warm = await ask(client, running, first.then(2), token_bytes, max_tokens=8)
        cold = await ask(client, running, first.then(2), token_bytes, max_tokens=8, cache_salt="another")
    assert warm.computed <= 8 + MESSAGE + BLOCK
    assert 0 < warm.sent <= MESSAGE + BLOCK
    assert cold.computed == cold.sent == len(cold.prompt)
    assert warm.answer == cold.answer
