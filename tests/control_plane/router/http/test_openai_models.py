"""What we send is what the unmodified `openai` client reads, over a real socket, by its own models."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from control_plane.router.access.tenants import Keys, Tenant
from engine.base.errors import DeadlineExceeded, ResourceExhausted, TriptychError, Unavailable
from engine.types import FinishReason
from tests.control_plane.router.edge_fakes import (
    MESSAGES,
    FakeCore,
    Router,
    Script,
    answers,
    in_turns,
    says,
    score,
    template,
)
from tests.control_plane.router.http_fakes import serving

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
TWO_CHOICES = says((0, [5], None), (1, [6], None), (0, [7], LENGTH), (1, [8], STOP))


@asynccontextmanager
async def client_of(router: Router, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    async with serving(router.app) as served:
        url = f"http://127.0.0.1:{served.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
            yield client


def router_with(script: Script | None = None, **options: Any) -> Router:
    router = Router(chat=template(), **options)
    router.core.script = script
    return router


def strictly(value: BaseModel) -> Any:
    """The client itself takes anything; its models, asked to, do not."""
    return type(value).model_validate(value.model_dump())


def scored(core: FakeCore, key: int) -> None:
    top = score(-0.5, (5, -0.5), (9, -1.5))
    in_turns([lambda: core.tokens(key, 5, logprobs=[top]), lambda: core.tokens(key, 6, finish=LENGTH, logprobs=[top])])


# -- completions -------------------------------------------------------------------------------------------------------
async def test_completions_whole() -> None:
    async with client_of(router_with(TWO_CHOICES)) as client:
        answer: Completion = strictly(await client.completions.create(model="tiny", prompt="a", n=2))
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [(" 5 7", "length"), (" 6 8", "stop")]
    assert answer.object == "text_completion" and answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer.to_dict()["triptych"]["decode_worker"] == "d1"  # type: ignore[index]


async def test_completions_of_several_prompts_streamed() -> None:
    async with client_of(router_with(TWO_CHOICES)) as client:
        options: Any = {"stream_options": {"include_usage": True}}
        stream = await client.completions.create(model="tiny", prompt=[[1], [2]], n=2, stream=True, **options)
        chunks = [chunk async for chunk in stream if chunk.choices]  # its model has no null reason; its API does
    texts = ["".join(one.choices[0].text for one in chunks if one.choices[0].index == index) for index in range(4)]
    assert texts == [" 5 7", " 6 8", " 5 7", " 6 8"]


async def test_completions_logprobs() -> None:
    async with client_of(router_with(scored)) as client:
        answer = strictly(await client.completions.create(model="tiny", prompt="a", logprobs=1))
    assert answer.choices[0].logprobs.tokens == [" 5", " 6"]
    assert answer.choices[0].logprobs.text_offset == [0, 2]


# -- chats -------------------------------------------------------------------------------------------------------------
async def test_chats_whole() -> None:
    async with client_of(router_with(TWO_CHOICES)) as client:
        answer: ChatCompletion = strictly(
            await client.chat.completions.create(model="tiny", messages=_messages(), n=2, max_completion_tokens=4)
        )
    assert [choice.message.content for choice in answer.choices] == [" 5 7", " 6 8"]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert (answer.object, answer.service_tier, answer.system_fingerprint) == ("chat.completion", None, None)


async def test_chats_streamed() -> None:
    async with client_of(router_with(TWO_CHOICES)) as client:
        options: Any = {"stream_options": {"include_usage": True}}
        stream = await client.chat.completions.create(model="tiny", messages=_messages(), n=2, stream=True, **options)
        chunks: list[ChatCompletionChunk] = [strictly(chunk) async for chunk in stream]
    said = [part for chunk in chunks for part in chunk.choices]
    assert [part.delta.role for part in said][:3] == ["assistant", "assistant", None]
    assert ["".join(part.delta.content or "" for part in said if part.index == index) for index in (0, 1)] == [
        " 5 7",
        " 6 8",
    ]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4


async def test_chats_by_the_clients_own_assembler() -> None:
    async with (
        client_of(router_with(answers([5], [6, 7]))) as client,
        client.chat.completions.stream(model="tiny", messages=_messages()) as stream,
    ):
        answer = await stream.get_final_completion()
    assert [choice.message.content for choice in answer.choices] == [" 5 6 7"]


async def test_chats_logprobs() -> None:
    async with client_of(router_with(scored)) as client:
        ask = client.chat.completions.create
        answer = strictly(await ask(model="tiny", messages=_messages(), logprobs=True, top_logprobs=2))
    tokens = answer.choices[0].logprobs.content
    assert [(token.token, token.bytes) for token in tokens] == [(" 5", [32, 53]), (" 6", [32, 54])]
    assert [(top.token, top.logprob) for top in tokens[0].top_logprobs] == [(" 5", -0.5), (" 9", -1.5)]


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ResourceExhausted("full"), openai.RateLimitError),
        (Unavailable("no decode worker"), openai.InternalServerError),
        (DeadlineExceeded("too late"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_are_the_clients_own_classes(
    error: TriptychError, kind: type[openai.APIStatusError], stream: bool
) -> None:
    async with client_of(router_with(answers(ending=error))) as client:
        with pytest.raises(kind) as raised:
            await client.chat.completions.create(model="tiny", messages=_messages(), stream=stream)
    assert raised.value.body is not None and error.message in str(raised.value)


async def test_a_failure_in_mid_stream_is_an_error_of_the_client() -> None:
    async with client_of(router_with(answers([5], ending=Unavailable("no decode worker")))) as client:
        stream = await client.chat.completions.create(model="tiny", messages=_messages(), stream=True)
        with pytest.raises(openai.APIError, match="no decode worker"):
            [chunk async for chunk in stream]


async def test_wrong_fields_models_and_keys() -> None:
    keys = Keys({"sk-acme": Tenant("acme")})
    async with client_of(router_with(keys=keys), key="sk-acme") as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="tiny", prompt="a", temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError, match="not served yet"):
            await client.embeddings.create(model="tiny", input="a")
    async with client_of(router_with(keys=keys), key="sk-wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


# -- models ------------------------------------------------------------------------------------------------------------
async def test_models_are_listed_and_found() -> None:
    async with client_of(router_with()) as client:
        models: list[Model] = [strictly(model) async for model in client.models.list()]
        assert [model.id for model in models] == ["tiny"]
        assert strictly(await client.models.retrieve("tiny")).id == "tiny"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")


def _messages() -> Any:
    return MESSAGES
