"""Attack: the bad requests of `bad_requests` over gRPC, as far as protobuf can say them, and what only protobuf can.

The same limits, the same sentences, the code that belongs to each; no worker hears of any of them.
"""

import json
import logging
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from control_plane.router.grpc.inference_service import SERVICE_NAME
from control_plane.router.grpc.services import NAMES
from control_plane.wire import inference_pb2 as pb
from engine.base import limits
from tests.attack.bad_requests import BOTH, MARK, Bad, table
from tests.attack.test_bad_input import logged, router
from tests.control_plane.router.grpc_fakes import ACME, KEYS, Server, running

CODES = {400: grpc.StatusCode.INVALID_ARGUMENT, 404: grpc.StatusCode.NOT_FOUND}
GENERATE = f"/{SERVICE_NAME}/Generate"
ANSWER_S = 10.0
Metadata = tuple[tuple[str, Any], ...]


@pytest.fixture
async def served() -> AsyncIterator[Server]:
    async with running(router()) as server:
        yield server


@dataclass(frozen=True, slots=True)
class Refusal:
    code: grpc.StatusCode
    message: str
    field: str | None


async def generate(server: Server, message: bytes, metadata: Metadata = (), method: str = GENERATE) -> list[Any]:
    call: Any = server.channel.unary_stream(method)
    return [answer async for answer in call(message, timeout=ANSWER_S, metadata=metadata)]


async def refusal(server: Server, message: bytes, metadata: Metadata = (), method: str = GENERATE) -> Refusal:
    """Raw bytes in: a stub would not send half of these."""
    try:
        await generate(server, message, metadata, method)
    except grpc.aio.AioRpcError as error:
        trailers = dict(error.trailing_metadata() or ())
        return Refusal(error.code(), error.details() or "", trailers.get("field"))
    raise AssertionError("it was served")


# -- the table, as messages --------------------------------------------------------------------------------------------
SAMPLING = frozenset(pb.GenerateSampling.DESCRIPTOR.fields_by_name)
PLAIN = ("model", "priority", "cache_salt", "add_special_tokens", "return_token_ids")
KNOBS = ("codec", "kl_budget", "deadline_ms")
SLO = {"ttft_ms": "ttft_slo_ms", "tpot_ms": "tpot_slo_ms"}


class NotSayable(Exception):
    """This protobuf has no words for it."""


def message_of(bad: Bad) -> pb.GenerateRequest:
    """Raises `NotSayable`."""
    try:
        fields: dict[str, Any] = json.loads(bad.body)
        return pb.GenerateRequest(**dict(arguments({**fields, "user": None})))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError):
        raise NotSayable from None


def arguments(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    sampling: dict[str, Any] = {}
    for name, value in fields.items():
        match name, value:
            case "user", _:
                pass
            case "prompt", str():
                yield "text", value
            case "prompt", list() if len(value) <= limits.PROMPT_TOKENS_MAX:
                yield "tokens", pb.TokenIds(ids=only(int, value))
            case "messages", list() if len(value) <= limits.MESSAGES_MAX:
                yield "chat", pb.Chat(messages=map(said, value))
            case "triptych", dict():
                yield from knobs(value)
            case "logit_bias", dict():
                sampling[name] = biases(value)
            case "structured_outputs", dict():
                sampling |= constraint(**value)
            case "logprobs", _ if "messages" in fields:  # a switch in a chat's JSON, a number here
                raise NotSayable
            case _ if name in PLAIN and value:
                yield name, same_type(pb.GenerateRequest(), name, value)
            case _ if name in SAMPLING and value is not None and value != []:
                sampling[name] = same_type(pb.GenerateSampling(), name, value)
            case _:
                raise NotSayable
    yield "sampling", pb.GenerateSampling(**sampling)


def only(kind: type, values: list[Any]) -> list[Any]:
    """Protobuf takes true for 1 and 1.0 for 1."""
    if {kind}.issuperset(map(type, values)):
        return values
    raise NotSayable


def biases(value: Mapping[str, Any]) -> dict[int, float]:
    if any(str(int(key)) != key or type(bias) not in (int, float) for key, bias in value.items()):
        raise NotSayable
    return {int(key): bias for key, bias in value.items()}


def said(message: Mapping[str, Any]) -> pb.ChatMessage:
    only(str, [message.get("role"), message.get("content")])
    return pb.ChatMessage(**message)


def same_type(empty: Any, name: str, value: Any) -> Any:
    kind = type(getattr(empty, name))
    if isinstance(value, list):
        return only(type(value[0]), value)
    return value if kind is float and type(value) is int else only(kind, [value])[0]


def knobs(said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in said.items():
        if name == "slo":
            yield from ((SLO[key], same_type(pb.GenerateRequest(), SLO[key], inner)) for key, inner in value.items())
        elif name in KNOBS and value:  # 0 and "" are protobuf's nothing
            yield name, same_type(pb.GenerateRequest(), name, value)
        else:
            raise NotSayable


def constraint(**said: Any) -> dict[str, Any]:
    ((name, value),) = said.items()
    match name, value:
        case "choice", list():
            return {"choice": pb.Strings(values=value)}
        case "json", str():
            return {"json_schema": value}
        case "json", dict():
            return {"json_schema": json.dumps(value)}
        case (("regex" | "grammar"), str()):
            return {name: value}
    raise NotSayable


def sayable() -> list[tuple[Bad, pb.GenerateRequest]]:
    found = []
    for bad in table():
        if bad.path in BOTH and bad.method == "POST" and bad.param != "body" and not bad.headers:
            try:
                found.append((bad, message_of(bad)))
            except NotSayable:
                continue
    return found


async def test_the_same_mistakes_get_the_same_sentences(served: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    rows = sayable()
    wrong = {}
    for bad, message in rows:
        got = await refusal(served, message.SerializeToString())
        if got != Refusal(CODES[bad.status], bad.message, bad.param):
            wrong[bad.name] = got
        assert MARK not in str(got), bad.name
    assert wrong == {}
    assert len(rows) > 150
    assert served.router.core.delivered == []
    assert served.router.edge.in_flight == 0
    assert MARK not in logged(caplog)


# -- what only protobuf can say ----------------------------------------------------------------------------------------
def asking(**sampling: Any) -> bytes:
    return pb.GenerateRequest(text=MARK, sampling=pb.GenerateSampling(**sampling)).SerializeToString()


NUMBERS = {
    "temperature": "[0, 100]",
    "top_p": "(0, 1]",
    "min_p": "[0, 1]",
    "presence_penalty": "[-2, 2]",
    "frequency_penalty": "[-2, 2]",
    "repetition_penalty": "(0, 100]",
}


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf, 1e308])
async def test_numbers_that_are_none(served: Server, field: str, value: float) -> None:
    expected = Refusal(CODES[400], f"{field}: must be a number in {NUMBERS[field]}", field)
    assert await refusal(served, asking(**{field: value})) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_biases_that_are_none(served: Server, value: float) -> None:
    expected = Refusal(CODES[400], "logit_bias: values must be numbers in [-100, 100]", "logit_bias")
    assert await refusal(served, asking(logit_bias={5: value})) == expected


async def test_lists_are_counted(served: Server) -> None:
    too_many = pb.GenerateRequest(tokens=pb.TokenIds(ids=[5] * (2 * limits.PROMPT_TOKENS_MAX)))
    expected = Refusal(CODES[400], f"prompt: at most {limits.PROMPT_TOKENS_MAX} tokens", "prompt")
    assert await refusal(served, too_many.SerializeToString()) == expected
    too_many.sampling.truncate_prompt_tokens = 5  # the last five of how many?
    assert await refusal(served, too_many.SerializeToString()) == expected
    message = pb.ChatMessage(role="user", content=MARK)
    too_many = pb.GenerateRequest(chat=pb.Chat(messages=[message] * (2 * limits.MESSAGES_MAX)))
    assert (await refusal(served, too_many.SerializeToString())).field == "messages"


async def test_no_prompt_is_told(served: Server) -> None:
    assert await refusal(served, b"") == Refusal(CODES[400], "prompt: required", "prompt")


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "", "five", "9" * 400, MARK, str(limits.SLO_MS_MAX + 1)])
async def test_metadata_has_the_limits_of_headers(served: Server, name: str, value: str) -> None:
    expected = Refusal(CODES[400], f"{name}: must be an integer from 1 to {limits.SLO_MS_MAX}", name)
    assert await refusal(served, asking(), ((name, value),)) == expected


# -- bytes -------------------------------------------------------------------------------------------------------------
MALFORMED = {
    "truncated": pb.GenerateRequest(text=MARK).SerializeToString()[:-1],
    "length beyond the end": b"\x12\xff\xff\xff\xff\x0f",
    "endless varint": b"\x30" + b"\xff" * 20,
    "unknown wire type": b"\x0f\x00",
    "group without an end": b"\x0b" * 1_000,
    "deep": b"\x22\xff" * 10_000,
    "invalid UTF-8": b"\x12\x02\xff\xfe",
    "surrogate": b"\x12\x03\xed\xa0\x80",
    "JSON": b'{"text":"a"}',
}


@pytest.mark.parametrize("service", NAMES)
@pytest.mark.parametrize("name", MALFORMED)
async def test_what_is_no_message_reaches_nobody(
    served: Server, name: str, service: str, caplog: pytest.LogCaptureFixture
) -> None:
    message = "message: must be the protobuf message that this method takes"
    got = await refusal(served, MALFORMED[name], method=f"/{service}/Generate")
    assert got == Refusal(CODES[400], message, "message")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    await is_well(served)


async def test_a_message_has_a_size(served: Server) -> None:
    huge = pb.GenerateRequest(text="z" * (4 * limits.MESSAGE_BYTES_MAX)).SerializeToString()
    assert (await refusal(served, huge)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await is_well(served)


async def test_fields_of_a_newer_client_are_ignored(served: Server) -> None:
    newer = pb.GenerateRequest(tokens=pb.TokenIds(ids=[1])).SerializeToString() + b"\xfa\x7f\x03new"
    assert await generate(served, newer)


async def test_unknown_methods_are_told(served: Server) -> None:
    for method in (f"/{SERVICE_NAME}/{MARK}", f"/{MARK}/Generate", "/"):
        call: Any = served.channel.unary_unary(method)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call(b"", timeout=ANSWER_S)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def is_well(server: Server) -> None:
    """Nothing was submitted before, and the next good request is."""
    assert server.router.core.delivered == []
    assert await generate(server, pb.GenerateRequest(text="a").SerializeToString())
    assert server.router.edge.in_flight == 0


# -- keys --------------------------------------------------------------------------------------------------------------
NO_KEYS = ("", "Bearer", "Bearer ", "sk-acme", "Basic sk-acme", "Bearer sk-acm", "Bearer SK-ACME", f"Bearer {MARK}")


async def test_without_a_key_of_ours_nothing_else_is_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(router(KEYS), keys=KEYS) as server:
        for key in NO_KEYS:
            for message in (asking(), asking(temperature=-1.0), b""):
                got = await refusal(server, message, (("authorization", key),))
                assert got.code is grpc.StatusCode.UNAUTHENTICATED
                assert got.message == "authorization: needs 'Bearer KEY' with a key of this server"
        assert (await refusal(server, asking(temperature=-1.0), ACME)).field == "temperature"
        assert server.router.core.delivered == []
    assert MARK not in logged(caplog)
