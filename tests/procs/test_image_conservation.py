"""500 requests with images over real processes, half of them left by their clients at random points, in whichever stage
they are then: no embedding, no column, no attempt and no pixel stays behind (reliability C7, C8; promises I3, I7)."""

import asyncio
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from control_plane.options import MODEL_DEMO, EngineOptions, ExecutorKind
from deploy.local import LocalCluster
from tests.procs.harness import REQUEST_TIMEOUT_S, cluster, metric, wait_quiet
from tests.procs.test_images import Part, body, picture

REQUESTS = 500
LEAVERS = 250
QUESTIONS = 24  # different ones: each is asked often, so that some embeddings are cached and some were evicted
CLIENTS = 16
LEAVE_WITHIN_S = 2.5  # most of them take a second or two
IMAGE_MS = 40.0
PIXELS_HELD = "triptych_image_bytes_held"
PACED = EngineOptions(
    model=MODEL_DEMO, executor=ExecutorKind.PACED, kv_cache_mib=64, embedding_cache_mib=1, encode_image_ms=IMAGE_MS
)


def question(number: int) -> dict[str, Any]:
    """One to three pictures, each of them in several questions."""
    draw = random.Random(number)
    pictures = [picture(draw.randrange(40), side=draw.choice((48, 96, 150))) for _ in range(draw.randint(1, 3))]
    parts: tuple[Part, ...] = (*(each.image for each in pictures), pictures[0].question)
    return body(parts)


async def answer(client: httpx.AsyncClient, running: LocalCluster, asked: dict[str, Any]) -> str:
    response = await client.post(f"{running.url}/v1/chat/completions", json=asked, timeout=REQUEST_TIMEOUT_S)
    assert response.status_code == httpx.codes.OK, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_nothing_is_left_after_five_hundred_requests_and_cancels_in_every_stage() -> None:
    asked = [question(number) for number in range(QUESTIONS)]
    draw = random.Random(0)
    leavers = set(draw.sample(range(REQUESTS), LEAVERS))
    turns = asyncio.Semaphore(CLIENTS)

    async def one(client: httpx.AsyncClient, running: LocalCluster, seed: int, right: list[str]) -> str:
        number = seed % QUESTIONS
        async with turns:
            if seed not in leavers:
                return "right" if await answer(client, running, asked[number]) == right[number] else "wrong"
            try:
                async with asyncio.timeout(random.Random(seed).uniform(0.0, LEAVE_WITHIN_S)):
                    return "right" if await answer(client, running, asked[number]) == right[number] else "wrong"
            except TimeoutError:
                return "left"

    async with cluster(engine=PACED, encode=2, prefill=1, decode=1) as running, httpx.AsyncClient() as client:
        right = [await answer(client, running, each) for each in asked]
        verdicts = Counter(await asyncio.gather(*(one(client, running, seed, right) for seed in range(REQUESTS))))
        seen = await wait_quiet(client, running)
        pixels_bytes = await metric(client, running, PIXELS_HELD)
    print(dict(verdicts))
    assert verdicts["wrong"] == 0
    assert verdicts["left"] > LEAVERS // 4, "too few were left in the middle"
    assert len(set(right)) == QUESTIONS, "answers do not depend on the pictures"
    assert sum(worker["embedding_columns"] for worker in seen.values()) > 0
    assert pixels_bytes == 0
