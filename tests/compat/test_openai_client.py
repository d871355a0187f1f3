"""The `openai` package as it is published, against real processes and real weights: every call of ours that it has.

What is streamed is what is answered in one piece, whatever the text: that is asked of random prompts with emoji,
combining marks and stop strings that lie across tokens.
"""

import json
import random
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from typing import Any

import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel
from tokenizers import Tokenizer

from deploy.local import LocalCluster
from engine.models.checkpoint import ensure_default_model
from tests.compat.served import MODEL

pytestmark = [
    pytest.mark.procs,
    pytest.mark.model,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(running: LocalCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


# -- completions -------------------------------------------------------------------------------------------------------
async def test_models(client: openai.AsyncOpenAI) -> None:
    (model,) = (await client.models.list()).data
    assert (model.id, model.object) == (MODEL, "model")
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_one_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert "Paris" in answer.choices[0].text
    assert answer.usage is not None and answer.usage.completion_tokens == 4
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"


@pytest.mark.parametrize(
    "prompts",
    [["One, two,", "Red, green,", "A, b,"], [[504, 3575, 282], [33, 28], [1, 2, 3, 4]]],
    ids=["texts", "token ids"],
)
async def test_a_list_of_prompts_is_answered_in_order(client: openai.AsyncOpenAI, prompts: Any) -> None:
    together = await client.completions.create(model=MODEL, prompt=prompts, max_tokens=5, temperature=0, n=2)
    assert [choice.index for choice in together.choices] == list(range(2 * len(prompts)))
    for place, prompt in enumerate(prompts):
        alone = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
        for copy in together.choices[2 * place : 2 * place + 2]:
            assert copy.text == alone.choices[0].text
    assert together.usage is not None and together.usage.completion_tokens == 10 * len(prompts)


async def test_several_prompts_streamed(client: openai.AsyncOpenAI) -> None:
    prompts = ["One, two,", "Red, green,"]
    whole = await client.completions.create(model=MODEL, prompt=prompts, max_tokens=6, temperature=0)
    texts = ["", ""]
    async for chunk in await client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=6, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


async def test_logprobs_and_echo(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model=MODEL, prompt="The sky is", max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.tokens is not None and scores.token_logprobs is not None
    assert answer.choices[0].text.startswith("The sky is") and "".join(scores.tokens) == answer.choices[0].text
    assert scores.token_logprobs[0] is None and all(score <= 0 for score in scores.token_logprobs[1:])  # type: ignore[operator]


# -- chat --------------------------------------------------------------------------------------------------------------
async def test_a_conversation(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_completion_tokens=16, temperature=0
    )
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content is not None and "Paris" in message.content
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion"


async def test_the_role_comes_with_the_first_token_and_usage_last(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=8,
        temperature=0,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = [chunk async for chunk in stream]
    for choice in (0, 1):
        deltas = [c.choices[0].delta for c in chunks if c.choices and c.choices[0].index == choice]
        assert deltas[0].role == "assistant" and not deltas[0].content
        assert all(delta.role is None for delta in deltas[1:])
    *told, last = chunks
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 16
    assert all(chunk.usage is None for chunk in told)
    assert {choice.finish_reason for chunk in told for choice in chunk.choices} == {None, "length"}


async def test_chat_logprobs(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    scores = answer.choices[0].logprobs
    assert scores is not None and scores.content is not None and len(scores.content) == 3
    assert "".join(entry.token for entry in scores.content) == answer.choices[0].message.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in scores.content)


class City(BaseModel):
    city: str
    rivers: int


async def test_structured_output_is_parsed_into_its_class(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=City, max_tokens=64, temperature=0
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "length" or isinstance(choice.message.parsed, City)


async def test_any_json(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, response_format={"type": "json_object"}, max_tokens=128, temperature=0
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


async def test_leaving_a_stream_frees_it(client: openai.AsyncOpenAI, running: LocalCluster) -> None:
    stream = await client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=500, stream=True)
    async for _ in stream:
        break
    await stream.close()
    answer = await client.completions.create(model=MODEL, prompt="Hello", max_tokens=1)
    assert answer.choices[0].finish_reason == "length"


async def test_what_the_package_has_no_method_for(client: openai.AsyncOpenAI, running: LocalCluster) -> None:
    plain = client.with_options(base_url=running.url)
    tokens: Any = await plain.post("/tokenize", body={"model": MODEL, "prompt": "Hello there"}, cast_to=object)
    text: Any = await plain.post("/detokenize", body={"model": MODEL, "tokens": tokens["tokens"]}, cast_to=object)
    info: Any = await plain.get("/tokenizer_info", cast_to=object)
    assert tokens["count"] == len(tokens["tokens"]) and text["prompt"] == "Hello there"
    assert info["eos_token"] == "<|im_end|>"
    assert await plain.get("/version", cast_to=object)
    assert await plain.post("/abort_requests", body={"request_ids": ["cmpl-nobody"]}, cast_to=object) is not None


# -- mistakes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"model": "gpt-7"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, openai.BadRequestError, "messages[0].role"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
    ],
)
async def test_mistakes_are_the_packages_own_exceptions(
    client: openai.AsyncOpenAI, fields: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(error) as caught:
        await client.chat.completions.create(**({"model": MODEL, "messages": QUESTION} | fields))
    assert caught.value.body is not None and caught.value.body["param"] == param  # type: ignore[index]
    assert param.partition("[")[0] in caught.value.message


# -- streamed text is unstreamed text ----------------------------------------------------------------------------------
PIECES: Sequence[str] = (
    *(
        "the quick brown fox",
        "Ünïcödé",
        "e\u0301a\u0308o\u0302",
        "नमस्ते दुनिया",
        "مرحبا",
        "日本語のテキスト",
        "\u200d",
        "\ufeff",
    ),
    *("😀😃", "👩‍👩‍👧‍👦", "🏳️‍🌈", "z͑ͫ̓ͪ̂ͫ̽͏", "\t\n\n", "```python\n", "<b>x</b>", "0123456789", "\\u0041", '"quoted"'),
)


def draw_request(number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Text that a model would hardly write by itself is made likely: its tokens, or parts of them, are the only ones
    allowed in half of the requests."""
    draw = random.Random(number)
    pieces = [draw.choice(PIECES) for _ in range(draw.randint(1, 6))]
    fields: dict[str, Any] = {
        "prompt": " ".join(pieces),
        "max_tokens": draw.randint(1, 16),
        "temperature": draw.choice((0.0, 0.7, 1.5)),
        "seed": number,
    }
    extra: dict[str, Any] = {}
    if draw.random() < 0.5:
        allowed = {token for piece in draw.sample(PIECES, 4) for token in tokenizer.encode(piece).ids}
        extra["allowed_token_ids"] = sorted(allowed)
    if draw.random() < 0.5:
        fields["stop"] = [draw.choice(PIECES)[-2:], *(a + b for a, b in pairwise(draw.sample("aeiou \u0301\u200d", 3)))]
        extra["include_stop_str_in_output"] = draw.random() < 0.5
    return {**fields, "extra_body": extra}


async def both_ways(client: openai.AsyncOpenAI, request: dict[str, Any]) -> tuple[tuple[str, Any], tuple[str, Any]]:
    """Alone in its batch and without cached KV both times: the last bits of a logit depend on either, and a token that
    is drawn at a high temperature on the last bits. What is asked here is what becomes of the tokens."""

    def apart(way: str) -> dict[str, Any]:
        return {**request, "extra_body": {**request["extra_body"], "cache_salt": way}}

    whole = (await client.completions.create(model=MODEL, **apart("whole"))).choices[0]
    text, finish = "", None
    async for chunk in await client.completions.create(model=MODEL, stream=True, **apart("streamed")):
        for choice in chunk.choices:
            text, finish = text + choice.text, choice.finish_reason or finish
    return (whole.text, whole.finish_reason), (text, finish)


async def differing(client: openai.AsyncOpenAI, numbers: Sequence[int]) -> list[int]:
    tokenizer = Tokenizer.from_file(str(ensure_default_model() / "tokenizer.json"))
    wrong = []
    for number in numbers:
        whole, streamed = await both_ways(client, draw_request(number, tokenizer))
        if whole != streamed:
            wrong.append(number)
    return wrong


async def test_streamed_is_unstreamed(client: openai.AsyncOpenAI) -> None:
    assert await differing(client, range(16)) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_streamed_is_unstreamed_for_200_prompts(client: openai.AsyncOpenAI) -> None:
    assert await differing(client, range(1_000, 1_200)) == []
