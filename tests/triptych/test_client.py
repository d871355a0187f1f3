"""Both clients against a real server on loopback, with the scripted core behind it."""

import asyncio
import inspect
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from control_plane.router.grpc.server_facts import ServerFacts
from control_plane.wire import inference_pb2 as pb
from engine.base import errors
from engine.types import FinishReason
from tests.control_plane.router.edge_fakes import Router, answers, in_turns, says, score
from tests.control_plane.router.grpc_fakes import KEYS, Server, running
from triptych.client import (
    AsyncClient,
    Cancelled,
    Client,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Options,
    ResourceExhausted,
    Tls,
    TokenLogprob,
    TriptychError,
    Unauthenticated,
    Unavailable,
)
from triptych.client.connection import ERRORS, Terms
from triptych.client.requests import generate_request

PROMPT = "prompt: must be text, a list of token ids, or a list of messages"
MESSAGES = "messages: must be a list of {'role': text, 'content': text, or a list of text and image parts}"
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


class Threaded:
    """A `Client` with the face of an `AsyncClient`, so that one test is a test of both; its calls run in threads."""

    def __init__(self, address: str, **options: Any) -> None:
        self.client = Client(address, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*arguments: Any, **options: Any) -> Any:
            return await asyncio.to_thread(getattr(self.client, name), *arguments, **options)

        return call

    def generate(self, *arguments: Any, **options: Any) -> "ThreadedStream":
        return ThreadedStream(self.client.generate(*arguments, **options))

    async def __aenter__(self) -> "Threaded":
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.client.close)


class ThreadedStream:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __aiter__(self) -> "ThreadedStream":
        return self

    async def __anext__(self) -> Any:
        delta = await asyncio.to_thread(next, self.stream, None)
        if delta is None:
            raise StopAsyncIteration
        return delta

    def close(self) -> None:
        self.stream.close()

    async def __aenter__(self) -> "ThreadedStream":
        self.stream.__enter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stream.__exit__(None, None, None)


@pytest.fixture(params=[AsyncClient, Threaded])
def make(request: pytest.FixtureRequest) -> Any:
    """Of either kind."""
    return request.param


@pytest.fixture
async def served() -> AsyncIterator[Server]:
    async with running(Router()) as server:
        yield server


@pytest.fixture
async def client(make: Any, served: Server) -> AsyncIterator[Any]:
    async with make(served.address) as client:
        yield client


# -- answers -----------------------------------------------------------------------------------------------------------
async def test_an_answer_as_it_comes(served: Server, client: Any) -> None:
    served.router.core.script = says((0, [5], None), (0, [6], LENGTH))
    deltas = [delta async for delta in client.generate([1, 2, 3])]
    assert "".join(delta.text for delta in deltas) == " 5 6"
    assert [token for delta in deltas for token in delta.token_ids] == [5, 6]
    *before, last = deltas
    assert {(delta.id, delta.prompt_tokens) for delta in deltas} == {("id1", 3)}
    assert all(delta.finish_reason is None and delta.stats is None for delta in before)
    assert (last.finish_reason, last.completion_tokens) == ("length", 2)
    assert (last.stats.prefill_worker, last.stats.kv_bytes_wire, last.stats.phase_ms["queue"]) == ("p1", 1_000, 1.0)


async def test_a_whole_answer_is_its_deltas_joined(served: Server, client: Any) -> None:
    served.router.core.script = says((1, [7], None), (0, [5], None), (1, [8, 42], STOP), (0, [6], LENGTH))
    answer = await client.complete([1, 2, 3], n=2, stop_token_ids=[42])
    assert [(choice.index, choice.text, choice.token_ids) for choice in answer.choices] == [
        (0, " 5 6", (5, 6)),
        (1, " 7 8", (7, 8, 42)),
    ]
    assert [(choice.finish_reason, choice.stop) for choice in answer.choices] == [("length", None), ("stop", 42)]
    assert (answer.text, answer.token_ids) == (" 5 6", (5, 6))
    assert (answer.id, answer.prompt_tokens, answer.completion_tokens, answer.stats.cached_tokens) == ("id1", 3, 5, 2)


async def test_stop_strings_are_named(served: Server, client: Any) -> None:
    served.router.core.script = says((0, [6, 7, 8], None))
    (choice,) = (await client.complete([1], stop=" 7")).choices
    assert (choice.text, choice.finish_reason, choice.stop) == (" 6", "stop", " 7")


async def test_logprobs(served: Server, client: Any) -> None:
    scored, sampled = score(-0.5, (9, -0.25), (2, -0.5)), score(-1.0, (5, -1.0))

    def script(core: Any, key: int) -> None:
        steps = [lambda: core.scored(key, 1, scored, scored)]
        in_turns([*steps, lambda: core.tokens(key, 5, finish=LENGTH, logprobs=[sampled])])

    served.router.core.script = script
    answer = await client.complete([1, 2, 3], logprobs=1, prompt_logprobs=2, return_token_ids=True)
    alternatives = ((9, -0.25), (2, -0.5))
    assert answer.prompt_logprobs == (TokenLogprob(2, -0.5, alternatives), TokenLogprob(3, -0.5, alternatives))
    assert answer.choices[0].logprobs == (TokenLogprob(5, -1.0, ((5, -1.0),)),)
    assert (answer.prompt_token_ids, answer.text) == ((1, 2, 3), " 5")


# -- ends --------------------------------------------------------------------------------------------------------------
async def begun(served: Server, client: Any, **options: Any) -> Any:
    """A stream of which one delta has been read, and to which nothing more will come."""
    before = len(served.router.core.submits)
    stream = client.generate([1], **options)
    reading = asyncio.ensure_future(anext(stream))
    await served.router.core.until(lambda: len(served.router.core.submits) > before)
    served.router.core.tokens(served.router.core.submits[-1].key, 5)
    assert (await reading).text == " 5"
    return stream


async def ended(served: Server) -> int:
    """Returns, with the number of cancels, once the server has forgotten every request."""
    await served.router.core.until(lambda: not served.router.edge.in_flight)
    return len(served.router.core.cancels)


async def test_closing_a_stream_ends_its_request(served: Server, client: Any) -> None:
    stream = await begun(served, client)
    stream.close()
    assert await ended(served) == 1
    with pytest.raises(Cancelled):
        await anext(stream)


async def test_leaving_the_block_ends_its_request(served: Server, client: Any) -> None:
    async with await begun(served, client):
        pass
    assert await ended(served) == 1


async def test_dropping_a_stream_ends_its_request(served: Server, client: Any) -> None:
    stream = await begun(served, client)
    del stream
    assert await ended(served) == 1


async def test_cancelling_the_reading_task_ends_its_request(served: Server) -> None:
    async with AsyncClient(served.address) as client:
        reading = asyncio.create_task(client.complete([1]))
        await served.router.core.until(lambda: served.router.core.submits)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert await ended(served) == 1


async def test_a_stream_closed_by_another_task_tells_its_reader(served: Server) -> None:
    async with AsyncClient(served.address) as client:
        stream = await begun(served, client)
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        stream.close()
        with pytest.raises(Cancelled, match="closed"):
            await reading


async def test_a_reader_that_is_cancelled_itself_is_told_so_even_of_a_closed_stream(served: Server) -> None:
    async with AsyncClient(served.address) as client:
        stream = await begun(served, client)
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        stream.close()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_a_client_that_is_closed_ends_its_streams_and_says_so(served: Server) -> None:
    client = AsyncClient(served.address)
    reading, stream = await begun(served, client), await begun(served, client)
    task = asyncio.create_task(anext(reading))
    await asyncio.sleep(0)
    await client.close()
    for waiting in (task, anext(stream)):
        with pytest.raises(Cancelled):
            await waiting


async def test_after_close_every_call_fails_alike(make: Any, served: Server) -> None:
    async with make(served.address) as client:
        pass
    calls = (lambda: client.complete("a"), lambda: client.abort("a"), client.model_info, client.ready)
    for call in calls:
        with pytest.raises(FailedPrecondition, match="the client is closed"):
            await call()


async def test_abort_ends_a_request_by_its_id(served: Server, client: Any) -> None:
    stream = await begun(served, client)
    await client.abort("id1")
    await client.abort("nobody")
    with pytest.raises(Cancelled):
        await anext(stream)


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgument("n: too many", field="n"),
        errors.ResourceExhausted("full", retry_after_ms=1_500),
        errors.Unavailable("none there", retry_after_ms=2_500),
        errors.DeadlineExceeded("too late"),
        errors.Cancelled("aborted"),
        errors.FailedPrecondition("another epoch"),
        errors.PermissionDenied("not yours"),
        errors.DataLoss("corrupt"),
        errors.NotFound("gone", field="model"),
        errors.Internal("internal error"),
    ],
)
async def test_an_error_is_what_the_server_raised(served: Server, client: Any, error: TriptychError) -> None:
    served.router.core.script = answers([5], ending=error)
    with pytest.raises(TriptychError) as raised:
        await client.complete([1, 2, 3])
    assert type(raised.value) is type(error)
    assert (raised.value.message, raised.value.retry_after_ms) == (error.message, error.retry_after_ms)
    assert getattr(raised.value, "field", None) == getattr(error, "field", None)
    assert raised.value.__cause__ is None  # gRPC's own has the peer's address and is long


def test_every_error_has_a_code_of_its_own() -> None:
    tree = {kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, TriptychError)}
    assert {*ERRORS.values(), Internal, TriptychError} == tree


async def test_the_first_word_about_a_bad_request_is_an_error(client: Any) -> None:
    with pytest.raises(InvalidArgument, match="temperature: must be") as raised:
        await anext(client.generate("a", temperature=-1))
    assert raised.value.field == "temperature"
    with pytest.raises(NotFound, match="model: "):
        await client.complete("a", model="other")


async def test_keys(make: Any) -> None:
    async with running(Router(), keys=KEYS) as server:
        server.router.core.script = answers([5])
        for wrong in ({}, {"api_key": "sk-nobody"}):
            async with make(server.address, **wrong) as client:
                for call in (client.complete([1]), client.model_info(), client.abort("id1")):
                    with pytest.raises(Unauthenticated):
                        await call
                assert await client.ready()
        async with make(server.address, api_key="sk-acme") as client:
            assert (await client.complete([1])).text == " 5"
        assert server.router.core.submits[0].tenant == "acme"


def test_a_key_is_not_shown() -> None:
    assert "sk-acme" not in repr(Terms(api_key="sk-acme", timeout_s=1.0))


@pytest.mark.parametrize("key", ["", "a\nb", "a b", "schlüssel"])
def test_what_is_no_key_is_refused_before_it_is_in_a_header(key: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidArgument) as raised:
            kind("127.0.0.1:1", api_key=key)
        assert raised.value.field == "api_key"


async def test_a_deadline_ends_both_sides(served: Server, client: Any) -> None:
    with pytest.raises(DeadlineExceeded):
        await client.complete([1], timeout_s=0.05)
    await ended(served)


async def test_the_clients_own_deadline_holds_where_a_call_names_none(make: Any, served: Server) -> None:
    async with make(served.address, timeout_s=0.05) as client:
        with pytest.raises(DeadlineExceeded):
            await client.complete([1])


async def test_nobody_there(make: Any) -> None:
    async with make("127.0.0.1:1") as client:
        assert not await client.ready()
        with pytest.raises(Unavailable):
            await client.server_info()


async def test_a_server_of_another_kind_is_a_failed_precondition(make: Any) -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with make(f"127.0.0.1:{port}") as client:
        with pytest.raises(FailedPrecondition):
            await client.server_info()
    await server.stop(grace=None)


async def test_tls(make: Any, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    router = Router()
    server = Server(router)
    pair = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
    port = server.server.add_secure_port("localhost:0", grpc.ssl_server_credentials([pair]))
    await server.server.start()
    async with make(f"localhost:{port}", tls=Tls(ca_file=tmp_path / "ca.pem")) as client:
        assert (await client.model_info()).model == "tiny"
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    async with make(f"localhost:{port}", tls=Tls(ca_file=tmp_path / "other.pem")) as client:
        with pytest.raises(Unavailable):
            await client.model_info()
    await server.channel.close()
    await server.server.stop(grace=None)


async def test_a_certificate_with_its_key_in_one_file(make: Any, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate, own = authority.issue_cert("localhost"), authority.issue_cert("client@example.org")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own.private_key_and_cert_chain_pem.write_to_path(tmp_path / "own.pem")
    server = Server(Router())
    pair = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
    asking = grpc.ssl_server_credentials([pair], authority.cert_pem.bytes(), require_client_auth=True)
    port = server.server.add_secure_port("localhost:0", asking)
    await server.server.start()
    tls = Tls(ca_file=tmp_path / "ca.pem", cert_file=tmp_path / "own.pem")
    async with make(f"localhost:{port}", tls=tls) as client:
        assert (await client.model_info()).model == "tiny"
    await server.channel.close()
    await server.server.stop(grace=None)


def test_a_key_without_a_certificate_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="key_file: needs a cert_file"):
        Tls(key_file=tmp_path / "key.pem")


# -- facts -------------------------------------------------------------------------------------------------------------
async def test_facts(make: Any) -> None:
    facts = ServerFacts(version="1.2.3", block_size=16, codecs=("raw",), codec="raw")
    async with running(Router(), facts=facts) as server, make(server.address) as client:
        model = await client.model_info()
        info = await client.server_info()
        loads = await client.loads()
    assert (model.model, model.max_model_len, model.max_prompt_tokens, model.eos_token_ids) == ("tiny", 64, 63, (999,))
    assert (info.version, info.block_size, info.codecs, info.ready, info.uptime_s) == ("1.2.3", 16, ("raw",), True, 0.0)
    (worker,) = loads.workers
    assert (worker.name, worker.roles, worker.state, worker.running) == ("prefill-0", ("prefill",), "SERVING", 2)
    assert (loads.running, loads.waiting, loads.active_requests) == (2, 1, 0)
    assert loads.kv_usage == pytest.approx(2 / 9)


async def test_readiness_as_a_whole_and_by_role(served: Server, client: Any) -> None:
    assert await client.ready()
    assert [await client.ready(role) for role in ("encode", "prefill", "decode")] == [False, True, False]
    with pytest.raises(NotFound):
        await client.ready("router")
    served.router.state.ready = False
    assert not await client.ready()


# -- requests ----------------------------------------------------------------------------------------------------------
def test_a_prompt_is_text_ids_or_a_conversation() -> None:
    assert generate_request("text", {}).text == "text"
    assert generate_request((1, 2), {}).tokens.ids == [1, 2]
    assert generate_request([], {}).WhichOneof("prompt") == "tokens"
    parts = ["a", {"type": "text", "text": "b"}, {"type": "image", "image": b"c"}]
    urls = [{"type": "image_url", "image_url": url} for url in ("d", {"url": "e"})]
    (message,) = generate_request([{"role": "user", "content": [*parts, *urls]}], {}).chat.messages
    assert [part.text or part.image.data or part.image.url for part in message.parts] == ["a", "b", b"c", "d", "e"]
    chat = generate_request([{"role": "user", "content": "Hi"}], {"chat_template_kwargs": {"a": 1}}).chat
    assert [(said.role, said.content) for said in chat.messages] == [("user", "Hi")]
    assert chat.chat_template_kwargs_json == '{"a": 1}'


def test_every_option_has_its_field_and_every_field_its_option() -> None:
    """One that the protocol gains must not be forgotten here."""
    constraint = {"json_schema", "json_object", "regex", "choice", "grammar"}
    fields = {*pb.GenerateSampling.DESCRIPTOR.fields_by_name, *pb.GenerateRequest.DESCRIPTOR.fields_by_name}
    fields |= {name.removesuffix("_json") for name in pb.Chat.DESCRIPTOR.fields_by_name}
    built = {"text", "tokens", "chat", "messages", "sampling", "deadline_ms"}  # by the prompt, and by `timeout_s`
    assert fields - built == Options.__annotations__.keys()
    assert constraint <= Options.__annotations__.keys()


def test_options_are_set_as_they_are_given() -> None:
    request = generate_request(
        "a",
        {
            "temperature": 0.0,
            "seed": None,
            "stop": ["a", "b"],
            "logit_bias": {5: -1.5},
            "json_schema": {"type": "object"},
            "cache_salt": "s",
            "ttft_slo_ms": 250,
        },
    )
    assert request.sampling.HasField("temperature") and not request.sampling.HasField("seed")
    assert (list(request.sampling.stop), dict(request.sampling.logit_bias)) == (["a", "b"], {5: -1.5})
    assert request.sampling.json_schema == '{"type": "object"}'
    assert (request.cache_salt, request.ttft_slo_ms, request.HasField("tpot_slo_ms")) == ("s", 250, False)
    assert list(generate_request("a", {"choice": ("x", "y")}).sampling.choice.values) == ["x", "y"]


@pytest.mark.parametrize(
    ("prompt", "options", "told"),
    [
        ([-1], {}, PROMPT),
        ([1.5], {}, PROMPT),
        (7, {}, PROMPT),
        ({"role": "user"}, {}, PROMPT),
        ([{"role": 1}], {}, MESSAGES),
        ([{"rôle": "user"}], {}, MESSAGES),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}], {}, MESSAGES),
        ([{"role": "user", "content": [{"type": "sound", "text": "secret"}]}], {}, MESSAGES),
        ([{"role": "user", "content": [{"type": "image", "image": "secret"}]}], {}, MESSAGES),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": b"secret"}}]}], {}, MESSAGES),
        ("a", {"max_tokens": -1}, "max_tokens: must be a whole number from 0 to 4294967295"),
        ("a", {"temperature": "hot"}, "temperature: must be a number"),
        ("a", {"stop": [1]}, "stop: must be a list of texts"),
        ("a", {"stop": 1}, "stop: must be a list of texts"),
        ("a", {"choice": [1]}, "choice: must be a list of texts"),
        ("a", {"choice": 1}, "choice: must be a list of texts"),
        ("a", {"ignore_eos": "yes"}, "ignore_eos: must be true or false"),
        ("a", {"json_schema": {"a": {1}}}, "json_schema: must be what JSON can hold"),
        ("a", {"logit_bias": {-1: 0.0}}, "logit_bias: must be token ids and numbers"),
        ("a", {"add_generation_prompt": True}, "add_generation_prompt: needs a conversation as the prompt"),
    ],
)
def test_what_no_message_can_hold_is_refused_by_name(prompt: Any, options: Any, told: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        generate_request(prompt, options)
    assert (raised.value.message, raised.value.field) == (told, told.partition(":")[0])


@pytest.mark.parametrize("name", sorted(Options.__annotations__))
def test_every_option_has_words_for_what_it_holds(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: must be [^<>]*$"):
        generate_request([{"role": "user"}], {name: object()})  # type: ignore[misc]


def test_an_unknown_option_is_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="temprature"):
        generate_request("a", {"temprature": 1.0})  # type: ignore[typeddict-unknown-key]


def test_both_clients_have_the_same_methods() -> None:
    def face(kind: type) -> dict[str, list[str]]:
        methods = {name: value for name, value in vars(kind).items() if not name.startswith("_") and callable(value)}
        return {name: list(inspect.signature(method).parameters) for name, method in methods.items()}

    assert face(Client) == face(AsyncClient)


def test_importing_the_client_brings_neither_the_engine_nor_the_router() -> None:
    program = (
        "import sys, triptych.client;"
        "heavy = ('torch', 'transformers', 'numpy', 'tokenizers', 'control_plane.router', 'engine.kv', 'typer');"
        "print([name for name in heavy if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=15)
    assert (run.stdout, run.stderr) == ("[]\n", "")


def test_errors_are_one_tree() -> None:
    for kind in (Cancelled, DataLoss, DeadlineExceeded, ResourceExhausted, Unauthenticated, Unavailable):
        assert issubclass(kind, TriptychError)
