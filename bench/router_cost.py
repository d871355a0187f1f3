"""What a streamed token costs the router: CPU time of its whole process, from the decode worker's message to the
client's socket, divided by the tokens that clients were given.

    python -m bench.router_cost

Workers are paced: their steps take as long as real ones, so tokens arrive as they would, batched per step. The router's
idle cost (keep-alives, statuses) is part of the figure; the clients' is not, they live in this process.

CPU time is only as comparable as the processors it was taken on, so a yardstick takes turns with the rounds: fixed work
of the same nature, interpreted Python that makes JSON and goes around an event loop. The figure and its bar are what
they are; a *gate* on some other machine may allow for the yardstick (`for_this_machine`).
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import httpx

from bench.cluster import cluster, cpu_s
from bench.figures import Bar, Figure, figure_of, save
from control_plane.options import EngineOptions, ExecutorKind
from deploy.local import LocalCluster

ROUNDS = 3
TOKENS = 120
PROMPT = tuple(range(1, 9))
ENGINE = EngineOptions(model="oracle", executor=ExecutorKind.PACED, max_model_len=1_024, kv_cache_mib=256)
REQUEST_TIMEOUT_S = 120.0

YARDSTICK_TURNS = 4_000
YARDSTICK_CHUNK = json.dumps({"id": "cmpl-0", "choices": [{"index": 0, "text": " a", "logprobs": None}], "usage": None})
YARDSTICK_US = 7.2  # a turn of it on the machine of bench/figures, otherwise idle
ALLOWANCE_MAX = 1.5  # a machine that is slower still says nothing about the router


def bar(streams: int, limit_us: float) -> Bar:
    return Bar(
        name=f"router, {streams} streams",
        claim=f"router CPU per token streamed over HTTP, {streams} clients at a time",
        unit="us",
        limit=limit_us,
    )


BARS = {8: bar(8, 250.0), 64: bar(64, 100.0)}


async def measure(rounds: int = ROUNDS) -> list[Figure]:
    async with cluster(ENGINE) as running, _client() as client:
        await _stream_all(client, running, 8)  # links are open and code is warm from here on
        return [await _figure(client, running, streams, rounds) for streams in BARS]


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=httpx.Limits(max_connections=max(BARS)))


async def _figure(client: httpx.AsyncClient, running: LocalCluster, streams: int, rounds: int) -> Figure:
    samples, yardsticks = [], [await yardstick_us()]
    for _ in range(rounds):
        samples.append(await _cost_us(client, running, streams))
        yardsticks.append(await yardstick_us())
    return figure_of(
        BARS[streams], samples, tokens_per_round=streams * TOKENS, yardstick_us=round(median(yardsticks), 2)
    )


async def yardstick_us() -> float:
    """CPU time of one turn of the yardstick, now."""
    before_s = time.thread_time()
    for _ in range(YARDSTICK_TURNS):
        json.dumps(json.loads(YARDSTICK_CHUNK))
        await asyncio.sleep(0)
    return (time.thread_time() - before_s) * 1e6 / YARDSTICK_TURNS


def for_this_machine(figure: Figure) -> Figure:
    """The same figure under a limit for the speed that this machine has shown. A faster one gets no stricter limit:
    the bar is what was promised."""
    limit = figure.bar.limit * allowance(figure.notes["yardstick_us"])
    return replace(figure, bar=replace(figure.bar, limit=limit))


def allowance(measured_us: float) -> float:
    """By how much a limit may grow where a turn of the yardstick costs this."""
    return min(max(measured_us / YARDSTICK_US, 1.0), ALLOWANCE_MAX)


async def _cost_us(client: httpx.AsyncClient, running: LocalCluster, streams: int) -> float:
    before_s = cpu_s(running.router.pid)
    chunks = await _stream_all(client, running, streams)
    spent_s = cpu_s(running.router.pid) - before_s
    if sum(chunks) < streams * TOKENS * 0.9:
        raise RuntimeError(f"tokens came merged, which is cheaper than what is measured: {sum(chunks)} chunks")
    return spent_s * 1e6 / (streams * TOKENS)


async def _stream_all(client: httpx.AsyncClient, running: LocalCluster, streams: int) -> Sequence[int]:
    return await asyncio.gather(*(_stream(client, running) for _ in range(streams)))


async def _stream(client: httpx.AsyncClient, running: LocalCluster) -> int:
    """One completion, to its end; the number of chunks it came in."""
    body = {"prompt": list(PROMPT), "max_tokens": TOKENS, "temperature": 0, "stream": True}
    chunks = 0
    async with client.stream("POST", f"{running.url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            chunks += line.startswith('data: {"id"')
    return chunks


def main() -> None:
    figures = asyncio.run(measure())
    for figure in figures:
        print(figure)
    print(f"wrote {save('router_cost', figures)}")


if __name__ == "__main__":
    main()
