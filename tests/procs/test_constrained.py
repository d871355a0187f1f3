"""Constrained output and all that is asked of tokens, over HTTP, with real weights.

Outputs are in their language; a hostile constraint is refused or fails alone; log-probabilities and what changes them
are those of transformers, in fp32.
"""

import asyncio
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from control_plane.options import Dtype, EngineOptions
from deploy.local import Child, LocalCluster
from tests.procs.harness import REQUEST_TIMEOUT_S, chunks, cluster, complete, wait_quiet

CLOSE = 1e-3  # nats
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
GREEDY = {"temperature": 0, "return_token_ids": True}
pytestmark = [pytest.mark.procs, pytest.mark.model, pytest.mark.timeout(180)]


def real(model_dir: Path) -> EngineOptions:
    return EngineOptions(model=str(model_dir), dtype=Dtype.FLOAT32, kv_cache_mib=128)


# -- constraints -------------------------------------------------------------------------------------------------------
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PHONE = r"\+?[0-9]{3}-[0-9]{4}"
WORDS = ["positive", "negative", "neither of the two"]


def is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


VALID: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}},
        is_person,
    ),
    "guided_json": ({"guided_json": json.dumps(PERSON)}, is_person),
    "regex": ({"structured_outputs": {"regex": PHONE}}, re.compile(PHONE).fullmatch),
    "choice": ({"structured_outputs": {"choice": WORDS}}, WORDS.__contains__),
    "grammar": ({"guided_grammar": 'start: "a"~2..4 "b"'}, re.compile("a{2,4}b").fullmatch),
}
DEEP: Any = {"type": "array", "items": {}}
for _ in range(40):
    DEEP = {"type": "array", "items": DEEP, "minItems": 1}
HOSTILE: dict[str, dict[str, Any]] = {
    "nested 40 deep": {"guided_json": DEEP},
    "nested 3,000 deep": {"guided_json": '{"items":' * 3_000 + "{}" + "}" * 3_000},
    "a state for each subset": {"guided_regex": "(.*a.{60}){3}"},
    "plus on plus": {"guided_regex": "((a+)+)+b"},
    "a billion letters": {"guided_regex": "a{1000000000}"},
    "repetition of repetitions": {"guided_regex": "((((a{1,100}){1,100}){1,100}){1,100})"},
    "a billion items": {"guided_json": {"type": "array", "minItems": 10**9}},
    "itself": {"guided_json": {"$ref": "#"}},
    "a circle": {
        "guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    },
    "a tree": {
        "guided_json": {
            "$ref": "#/$defs/n",
            "$defs": {"n": {"type": "object", "properties": {f"n{i}": {"$ref": "#/$defs/n"} for i in range(200)}}},
        }
    },
    "an ambiguous grammar": {"guided_grammar": 'start: x\nx: x x x | x x | "a" |'},
    "a divisor of a million": {"guided_json": {"type": "integer", "multipleOf": 999_983}},
}


def cpu_s(*children: Child) -> float:
    """What these processes have used so far."""
    used = (Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13] for child in children)
    return sum(int(ticks) for pair in used for ticks in pair) / TICKS_PER_S


async def post(client: httpx.AsyncClient, running: LocalCluster, body: dict[str, Any]) -> httpx.Response:
    return await client.post(f"{running.url}/v1/completions", json=body, timeout=REQUEST_TIMEOUT_S)


def short(constraint: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "Answer:", "max_tokens": 4, **constraint}


async def neighbour(client: httpx.AsyncClient, running: LocalCluster) -> list[int]:
    body = {**GREEDY, "prompt": "Once upon a time", "max_tokens": 32, "ignore_eos": True, "stream": True}
    events = [event async for event in chunks(client, running, body)]
    return [token for event in events for choice in event["choices"] for token in choice["token_ids"]]


async def cost_s(client: httpx.AsyncClient, running: LocalCluster, constraint: dict[str, Any]) -> float:
    """All processes' CPU seconds for one short request."""
    before_s = cpu_s(running.router, *running.workers)
    await post(client, running, short(constraint))
    return cpu_s(running.router, *running.workers) - before_s


@pytest.mark.slow
async def test_constrained_outputs_are_valid_and_hostile_constraints_fail_alone(model_dir: Path) -> None:
    async with cluster(engine=real(model_dir), ready_timeout_s=120.0) as running, httpx.AsyncClient() as client:
        await asyncio.gather(*(check_valid(client, running, name) for name in VALID))
        alone = await neighbour(client, running)
        beside = asyncio.create_task(neighbour(client, running))
        sent = (post(client, running, short(HOSTILE[name])) for name in HOSTILE)
        answers = dict(zip(HOSTILE, await asyncio.gather(*sent), strict=True))
        assert await beside == alone
        plain_s = await cost_s(client, running, {})
        costs_s = {name: await cost_s(client, running, HOSTILE[name]) - plain_s for name in HOSTILE}
        await wait_quiet(client, running)
    print({name: (answers[name].status_code, round(costs_s[name], 2)) for name in HOSTILE})
    for name, answer in answers.items():
        assert answer.status_code in (200, 400), (name, answer.text)
        assert answer.status_code == 200 or answer.json()["error"]["param"] == next(iter(HOSTILE[name])), name
    assert max(costs_s.values()) < 1.0, costs_s


async def check_valid(client: httpx.AsyncClient, running: LocalCluster, name: str) -> None:
    constraint, is_valid = VALID[name]
    body = {"prompt": f"{name}: ", "max_tokens": 100, "temperature": 1.0, "seed": 1, "n": 2, **constraint}
    for choice in (await complete(client, running, body))["choices"]:
        assert choice["finish_reason"] == "stop", (name, choice)
        assert is_valid(choice["text"]), (name, choice)


# -- scores, and what changes them -------------------------------------------------------------------------------------
class Transformers:
    """The reference: logits after each token, of the model as transformers runs it."""

    def __init__(self, model_dir: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def logits(self, tokens: Sequence[int]) -> Any:
        with self._torch.no_grad():
            return self._model(self._torch.tensor([tokens])).logits[0]

    def logprobs(self, tokens: Sequence[int]) -> Any:
        """Row i: of the token after token i."""
        return self.logits(tokens).log_softmax(-1)

    def picks(
        self, prompt: Sequence[int], output: Sequence[int], adjust: Callable[[Any, list[int]], None]
    ) -> list[int]:
        """What greedy sampling takes after each token of `output`, had `adjust(logits, output so far)` its way."""
        rows = self.logits([*prompt, *output])[len(prompt) - 1 : -1].clone()
        for position, row in enumerate(rows):
            adjust(row, list(output[:position]))
        return [int(token) for token in rows.argmax(-1)]


PROMPT = "The quick brown fox jumps over the lazy dog. The quick brown"
OUTPUT = 6  # tokens
SCORED = (0, OUTPUT)  # output tokens of requests that ask for scores of the prompt, too

Answer = dict[str, Any]
Adjust = Callable[[Any, list[int]], None]


@pytest.mark.slow
async def test_scores_and_sampling_fields_are_those_of_transformers(model_dir: Path) -> None:
    engine = real(model_dir)
    async with (
        cluster(engine=engine, prefill=0, decode=0, mixed=1, ready_timeout_s=120.0) as running,
        httpx.AsyncClient() as client,
    ):

        async def choice(**fields: Any) -> Answer:
            value = await complete(client, running, {"prompt": PROMPT, "max_tokens": OUTPUT, **GREEDY, **fields})
            first: Answer = value["choices"][0]
            return first

        plain = await choice()
        changes = changes_of(plain)
        scored = await asyncio.gather(*(choice(echo=True, logprobs=2, max_tokens=tokens) for tokens in SCORED))
        changed = await asyncio.gather(*(choice(**fields) for fields, _ in changes.values()))
        stopped = await choice(stop=[first_word(plain)])
        await wait_quiet(client, running)
    reference = Transformers(model_dir)  # not before: two pools of threads on the same cores hold each other up
    for answer in scored:
        check_scores(answer, reference)
    check_changes(plain, dict(zip(changes, changed, strict=True)), changes, reference)
    assert (stopped["text"], stopped["finish_reason"], stopped["stop_reason"]) == (" ", "stop", first_word(plain))


def first_word(plain: Answer) -> str:
    word: str = plain["text"].split()[0]
    return word


def check_scores(answer: Answer, reference: Transformers) -> None:
    """lm-eval's way: the prompt is scored, whether or not anything is generated."""
    tokens = answer["prompt_token_ids"] + answer["token_ids"]
    rows = reference.logprobs(tokens)
    scores, tops = answer["logprobs"]["token_logprobs"], answer["logprobs"]["top_logprobs"]
    assert len(scores) == len(tokens) == len(answer["prompt_token_ids"]) + len(answer["token_ids"])
    assert scores[0] is None
    assert scores[1:] == pytest.approx([float(rows[i, token]) for i, token in enumerate(tokens[1:])], abs=CLOSE)
    assert [max(top.values()) for top in tops[1:]] == pytest.approx([float(row.max()) for row in rows[:-1]], abs=CLOSE)
    assert answer["text"] == "".join(answer["logprobs"]["tokens"])


def changes_of(plain: Answer) -> dict[str, tuple[dict[str, Any], Adjust]]:
    """Fields that change what is sampled, and what they do to the logits."""
    prompt, (first, *_) = plain["prompt_token_ids"], plain["token_ids"]

    def allow(row: Any, so_far: list[int]) -> None:
        row[:5] = row[8:] = float("-inf")

    def penalise(row: Any, so_far: list[int]) -> None:
        allow(row, so_far)
        for token in set(so_far):
            row[token] -= 1.7 * so_far.count(token) + 0.9

    def repeat(row: Any, so_far: list[int]) -> None:
        for token in {*prompt, *so_far}:
            row[token] = row[token] / 1.3 if row[token] > 0 else row[token] * 1.3

    def forbid(row: Any, so_far: list[int]) -> None:
        row[first] = float("-inf")

    def forbid_for_4(row: Any, so_far: list[int]) -> None:
        if len(so_far) < 4:
            forbid(row, so_far)

    def lift(row: Any, so_far: list[int]) -> None:
        row[1_000] += 100.0

    allowed = {"allowed_token_ids": [5, 6, 7]}
    return {
        "same": ({}, lambda row, so_far: None),
        "allowed": (allowed, allow),
        "penalised": ({**allowed, "frequency_penalty": 1.7, "presence_penalty": 0.9}, penalise),
        "repeated": ({"repetition_penalty": 1.3}, repeat),
        "biased": ({"logit_bias": {str(first): -100}}, forbid),
        "lifted": ({"logit_bias": {"1000": 100}}, lift),
        "without": ({"bad_words": [first_word(plain)]}, forbid),
        "delayed": ({"stop_token_ids": [first], "min_tokens": 4}, forbid_for_4),
    }


def check_changes(
    plain: Answer,
    changed: dict[str, Answer],
    changes: dict[str, tuple[dict[str, Any], Adjust]],
    reference: Transformers,
) -> None:
    """Each as transformers' logits, changed in the same way, would have it; and each of them did change something."""
    outputs = {name: answer["token_ids"] for name, answer in changed.items()}
    for name, output in outputs.items():
        assert output == reference.picks(plain["prompt_token_ids"], output, changes[name][1]), name
    assert outputs["same"] == plain["token_ids"]
    assert plain["token_ids"] not in [outputs[name] for name in ("repeated", "biased", "without", "delayed")]
    assert outputs["allowed"] != outputs["penalised"]
    assert outputs["lifted"] == [1_000] * OUTPUT
