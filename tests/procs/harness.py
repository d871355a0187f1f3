"""Real processes on loopback, driven over HTTP, checked against the oracle (rung L2).

A test says which cluster it wants and what happens to whom; here live the clients that keep asking meanwhile, and the
checks on what they were told. Nothing here sleeps for luck: every wait is for a condition, with a deadline.
"""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from control_plane.options import EngineOptions, ExecutorKind, LogLevel
from deploy.local import LocalCluster
from deploy.options import ServeOptions
from engine.base import limits
from engine.executors.oracle import OracleExecutor, reference_tokens
from engine.executors.paced import smollm2_schema
from engine.types import SamplingParams

ORACLE = EngineOptions(model="oracle", executor=ExecutorKind.ORACLE, max_model_len=2_048, kv_cache_mib=8)
DEFAULT_ORACLE = OracleExecutor.Config()
PACED_ORACLE = OracleExecutor.Config(schema=smollm2_schema())
REQUEST_TIMEOUT_S = 60.0
QUIET_TIMEOUT_S = 20.0
CLIENTS = 8
POLL_S = 0.1


@asynccontextmanager
async def cluster(
    *,
    engine: EngineOptions = ORACLE,
    encode: int = 0,
    prefill: int = 1,
    decode: int = 1,
    mixed: int = 0,
    restart: bool = False,
    drain_timeout_s: float = 5.0,
    environments: Mapping[str, Mapping[str, str]] | None = None,
    ready_timeout_s: float = 60.0,
) -> AsyncIterator[LocalCluster]:
    """A running cluster, ready, with ports of its own; ended whatever the test does."""
    options = ServeOptions(
        engine=engine,
        port=0,
        admin_port=0,
        grpc_port=0,
        encode=encode,
        prefill=prefill,
        decode=decode,
        mixed=mixed,
        drain_timeout_s=drain_timeout_s,
        log_level=LogLevel.WARNING,
    )
    running = LocalCluster(options, environments=environments)
    try:
        await running.start(restart=restart)
        await running.wait_ready(ready_timeout_s)
        yield running
    finally:
        await running.stop()


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request and the one right answer to it."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    expected: tuple[int, ...]

    def body(self, **fields: Any) -> dict[str, Any]:
        return {
            "prompt": list(self.token_ids),
            "max_tokens": self.sampling.max_tokens,
            "temperature": self.sampling.temperature,
            "seed": self.sampling.seed,
            "stream": True,
            **fields,
        }


def oracle_prompt(
    seed: int,
    *,
    prompt_tokens: tuple[int, int] = (1, 200),
    max_tokens: tuple[int, int] = (1, 40),
    config: OracleExecutor.Config = DEFAULT_ORACLE,
) -> Prompt:
    draw = random.Random(seed)
    token_ids = tuple(draw.randrange(config.vocab_size) for _ in range(draw.randint(*prompt_tokens)))
    temperature = draw.choice((0.0, 0.8))
    sampling = SamplingParams(
        temperature=temperature, seed=draw.randrange(1 << 32), max_tokens=draw.randint(*max_tokens)
    )
    expected = reference_tokens(token_ids, "", sampling, sampling.max_tokens, config)
    return Prompt(token_ids=token_ids, sampling=sampling, expected=tuple(expected))


@dataclass(slots=True)
class Answer:
    """What one client was told, whole or not."""

    status: int = 0
    text: str = ""
    finish: str | None = None
    error: dict[str, Any] | None = None
    triptych: dict[str, Any] = field(default_factory=dict)
    done: bool = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(int(word) for word in self.text.split())


async def ask(client: httpx.AsyncClient, url: str, prompt: Prompt, *, leave_after_chunks: int | None = None) -> Answer:
    """Stream one completion to its end, or leave in the middle of it."""
    answer = Answer()
    async with client.stream(
        "POST", f"{url}/v1/completions", json=prompt.body(), timeout=REQUEST_TIMEOUT_S
    ) as response:
        answer.status = response.status_code
        if response.status_code != httpx.codes.OK:
            answer.error = json.loads(await response.aread())["error"]
            return answer
        chunks = 0
        async for line in response.aiter_lines():
            if leave_after_chunks is not None and chunks >= leave_after_chunks:
                return answer
            if line.startswith("data: "):
                chunks += 1
                _take(answer, line.removeprefix("data: "))
    return answer


async def complete(client: httpx.AsyncClient, running: LocalCluster, body: Mapping[str, Any]) -> dict[str, Any]:
    """One completion in one piece: the whole JSON value."""
    response = await client.post(f"{running.url}/v1/completions", json=body, timeout=REQUEST_TIMEOUT_S)
    assert response.status_code == httpx.codes.OK, response.text
    value: dict[str, Any] = response.json()
    return value


async def chunks(
    client: httpx.AsyncClient, running: LocalCluster, body: Mapping[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """One completion as it is streamed: every event's JSON value. Close it to leave."""
    address = f"{running.url}/v1/completions"
    async with client.stream("POST", address, json=body, timeout=REQUEST_TIMEOUT_S) as response:
        assert response.status_code == httpx.codes.OK, await response.aread()
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data and data != "[DONE]":
                yield json.loads(data)


def _take(answer: Answer, data: str) -> None:
    if data == "[DONE]":
        answer.done = True
        return
    chunk = json.loads(data)
    answer.error = chunk.get("error", answer.error)
    answer.triptych = chunk.get("triptych", answer.triptych)
    for choice in chunk.get("choices", ()):
        answer.text += choice["text"]
        answer.finish = choice["finish_reason"] or answer.finish


async def ask_all(running: LocalCluster, prompts: Sequence[Prompt]) -> list[Answer]:
    """All prompts over CLIENTS connections, each client one request after the other."""
    answers: dict[int, Answer] = {}
    numbers = itertools.count()

    async def client_loop(client: httpx.AsyncClient) -> None:
        while (number := next(numbers)) < len(prompts):
            answers[number] = await ask(client, running.url, prompts[number])

    async with httpx.AsyncClient() as client:
        await asyncio.gather(*(client_loop(client) for _ in range(CLIENTS)))
    return [answers[number] for number in range(len(prompts))]


def verdict(prompt: Prompt, answer: Answer) -> str:
    """ "right", "wrong", or why there is no whole answer."""
    if answer.token_ids != prompt.expected[: len(answer.token_ids)]:
        return "wrong"
    if answer.error is not None:
        return f"error {answer.status} {answer.error['type']}"
    whole = answer.done and answer.finish is not None and answer.token_ids == prompt.expected
    return "right" if whole else "cut off"


async def metric(client: httpx.AsyncClient, running: LocalCluster, name: str) -> float:
    """The router's, without labels."""
    lines = (await client.get(f"{running.admin_url}/metrics")).text.splitlines()
    (value,) = (line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} "))
    return float(value)


async def workers(client: httpx.AsyncClient, running: LocalCluster) -> dict[str, dict[str, Any]]:
    """`GET /admin/v1/workers` by name."""
    response = await client.get(f"{running.admin_url}/admin/v1/workers")
    return {worker["name"]: worker for worker in response.json()["workers"]}


def holdings(worker: Mapping[str, Any]) -> dict[str, int]:
    """What a worker still holds for anybody; all zero when quiet."""
    names = ("attempts", "held", "lent_columns", "running", "waiting", "encoding")
    owned = worker["total_columns"] - worker["free_columns"]
    embedded = worker["embedding_columns"] - worker["free_embedding_columns"]
    return {"owned": owned, "embedded": embedded} | {name: worker[name] for name in names}


def busy(seen: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """The workers that hold anything, and what."""
    return {name: holdings(worker) for name, worker in seen.items() if any(holdings(worker).values())}


async def wait_quiet(client: httpx.AsyncClient, running: LocalCluster) -> dict[str, dict[str, Any]]:
    """Until some workers are connected and none of them holds anything; the look that saw it. Or TimeoutError with
    the last look."""
    seen: dict[str, dict[str, Any]] = {}

    async def quiet() -> bool:
        nonlocal seen
        seen = {name: worker for name, worker in (await workers(client, running)).items() if worker["connected"]}
        return bool(seen) and not busy(seen)

    await until(quiet, lambda: f"connected {sorted(seen)}, busy {busy(seen)}", QUIET_TIMEOUT_S)
    return seen


async def settle(client: httpx.AsyncClient, running: LocalCluster) -> dict[str, dict[str, Any]]:
    """Quiet, and the workers have said so: what is known of them is up to a heartbeat old."""
    await wait_quiet(client, running)
    await asyncio.sleep(2 * limits.HEARTBEAT_MS / 1_000)
    return await wait_quiet(client, running)


async def until(
    condition: Callable[[], Awaitable[bool]], last_look: Callable[[], object], timeout_s: float = QUIET_TIMEOUT_S
) -> None:
    """Ask again and again; TimeoutError says what was seen last."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    while not await condition():
        if asyncio.get_running_loop().time() > deadline_s:
            raise TimeoutError(f"after {timeout_s:.0f} s: {last_look()}")
        await asyncio.sleep(POLL_S)
