"""Attack: bodies that nobody would write against the whole edge. Each is answered as documented, and soon.

Two sources: what schemathesis makes of our own OpenAPI document, fitting it and not, and valid bodies damaged byte by
byte (`fuzzing`). No answer is a 5xx, every refusal has the one shape of an error, memory stays flat, and the router
serves the next good request. All seeded: the same bodies every time.
"""

import asyncio
import contextlib
import gc
import json
import logging
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final

import httpx
import hypothesis
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode

from control_plane.router.http import openapi
from control_plane.router.requests import PromptScored
from engine.types import FinishReason, TokenLogprobs
from tests.attack import fuzzing
from tests.attack.bad_requests import Bad
from tests.attack.test_bad_input import Reply, ask, router
from tests.control_plane.router.edge_fakes import CARD, FakeCore, events, in_turns
from tests.procs.harness import ask_all, cluster, oracle_prompt, settle, verdict

ROOMY: Final = replace(CARD, max_model_len=4_096)  # so that few bodies are refused for their length alone
DOCUMENT: Final = openapi.document(ROOMY, "0")
ANSWER_S: Final = 10  # whoever has not answered by then hangs
FEW, MANY = 400, 8_000  # damaged bodies
TIMERS_BYTES = 64 << 10  # asyncio keeps about a hundred timers that are over; less than 100 bytes for each body
FEW_OF_EACH, MANY_OF_EACH = 20, 200  # bodies for each path from the document, fitting and not


def generate(core: FakeCore, key: int) -> None:
    """Answer whatever was asked for: two tokens for each choice, scored if they shall be."""
    submit = core.submits[-1]
    score = TokenLogprobs(-0.5, 1, ((5, -0.5), (6, -1.5)))
    scores = (score,) if submit.sampling.logprobs is not None else ()
    steps = [
        partial(core.tokens, key, 5, choice=choice, finish=finish, logprobs=scores)
        for finish in (None, FinishReason.LENGTH)
        for choice in range(submit.choices)
    ]
    if submit.sampling.prompt_logprobs is not None:
        core.edge.on_output(PromptScored(key, 1, (score,) * (len(submit.token_ids) - 1)))
    in_turns(steps)


class Target:
    """The edge over a core that answers everything, and what came of what was sent there."""

    def __init__(self) -> None:
        self.router = router(card=ROOMY)
        self.router.core.script = generate
        self.statuses: Counter[int] = Counter()
        self._error = jsonschema.Draft202012Validator(DOCUMENT["components"]["schemas"]["Error"])

    async def attack(self, path: str, body: bytes, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        request = Bad(row="D1", name="", path=path, body=body, message="", param=None, headers=headers)
        async with asyncio.timeout(ANSWER_S):
            reply = await ask(self.router.app, request)
        self.statuses[reply.status] += 1
        self.judge(path, reply)
        self.router.core.delivered.clear()

    def judge(self, path: str, reply: Reply) -> None:
        documented = DOCUMENT["paths"][path]["post"]["responses"]
        assert reply.status < 500
        assert str(reply.status) in documented
        if reply.status != 200:
            self._error.validate(json.loads(reply.body))
        elif reply.headers.get("content-type", "").startswith("text/event-stream"):
            assert "error" not in events(reply.body)[-1]
        elif reply.body:
            json.loads(reply.body)

    async def is_well(self) -> None:
        """It serves, and holds nothing of those before."""
        await self.attack("/v1/completions", b'{"prompt":[1,2,3],"n":2}')
        assert self.statuses[200] > 0
        assert self.router.edge.in_flight == 0
        assert self.router.core.open_choices == {}


# -- damaged bodies ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "count", [FEW, pytest.param(MANY, marks=(pytest.mark.slow, pytest.mark.timeout(170)), id="many")]
)
async def test_damaged_bodies_are_answered_as_documented(count: int) -> None:
    target = Target()
    for path, body in fuzzing.damaged(count, seed=count):
        await target.attack(path, body)
    await target.is_well()
    assert target.statuses[200] > count // 50  # some damage does not matter: the others would otherwise prove little
    assert target.statuses[400] > count // 4


async def test_memory_is_flat(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)  # whoever listens keeps every line
    target = Target()
    bodies = list(fuzzing.damaged(FEW // 2, seed=1))

    async def traced_bytes(rounds: int) -> int:
        for path, body in bodies * rounds:
            await target.attack(path, body)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before_bytes = await traced_bytes(1)  # what is made once: names in the log, series of metrics
        assert await traced_bytes(3) - before_bytes < TIMERS_BYTES
    finally:
        tracemalloc.stop()


# -- bodies from the document ------------------------------------------------------------------------------------------
POSTS: Final = tuple(path for path, methods in DOCUMENT["paths"].items() if "requestBody" in methods.get("post", {}))


@contextlib.contextmanager
def loop() -> Iterator[asyncio.Runner]:
    """Hypothesis calls a function that is none of asyncio's, many times: one loop for all of them."""
    with asyncio.Runner() as runner:
        yield runner


def attack_with_cases(path: str, mode: GenerationMode, count: int) -> Counter[int]:
    operation = schemathesis.openapi.from_dict(DOCUMENT)[path]["POST"]
    target = Target()
    with loop() as runner:

        @hypothesis.settings(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def attack(case: Any) -> None:
            runner.run(target.attack(path, body_of(case), headers_of(case)))

        attack()
        runner.run(target.is_well())
    if mode is GenerationMode.POSITIVE:  # what fits the document is mostly served
        assert target.statuses[200] > count // 3
    return target.statuses


def body_of(case: Any) -> bytes:
    if isinstance(case.body, bytes):
        return case.body
    if isinstance(case.body, schemathesis.core.NotSet):
        return b""
    return json.dumps(case.body).encode("utf-8", "surrogatepass")


def headers_of(case: Any) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((name.lower().encode("latin-1"), str(value).encode()) for name, value in (case.headers or {}).items())


@pytest.mark.parametrize(
    ("path", "mode"), [("/v1/completions", GenerationMode.POSITIVE), ("/v1/chat/completions", GenerationMode.NEGATIVE)]
)
def test_cases_from_the_document_are_answered_as_documented(path: str, mode: GenerationMode) -> None:
    statuses = attack_with_cases(path, mode, FEW_OF_EACH)
    assert statuses.total() > FEW_OF_EACH // 2


@pytest.mark.slow
@pytest.mark.timeout(170)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", POSTS)
def test_many_cases_from_the_document(path: str, mode: GenerationMode) -> None:
    assert attack_with_cases(path, mode, MANY_OF_EACH).total() > MANY_OF_EACH // 2


# -- real processes ----------------------------------------------------------------------------------------------------
OVER_THE_WIRE = 2_000


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.timeout(170)
async def test_a_real_cluster_outlives_damaged_bodies() -> None:
    prompts = [oracle_prompt(seed) for seed in range(8)]
    async with cluster() as running, httpx.AsyncClient(base_url=running.url, timeout=ANSWER_S) as client:
        statuses: Counter[int] = Counter()
        for path, body in fuzzing.damaged(OVER_THE_WIRE, seed=5):
            statuses[(await client.post(path, content=body)).status_code] += 1
        assert not [status for status in statuses if status >= 500]
        assert statuses[200] > 0
        told = await ask_all(running, prompts)
        assert [verdict(prompt, answer) for prompt, answer in zip(prompts, told, strict=True)] == ["right"] * 8
        await settle(client, running)
