"""Clients who want the public port to themselves: each costs little, is told so if possible, and harms nobody else."""

import json
import time
from typing import Any

import pytest

from engine.base import limits
from engine.base.errors import InvalidArgument
from tests.control_plane.router.edge_fakes import Router, answers
from tests.control_plane.router.http_fakes import GET, POST_CHUNKED, Client, Hello, serving

HALF_A_GET = b"GET / HTTP/1.1\r\nhost: a\r\n"
REFUSAL_CPU_MS_MAX = 150  # about 15 on the machine this was written on; decoding all of it took 100 to 1000


async def refusal(client: Client) -> tuple[int, dict[str, str]]:
    """A refusal in our shape, after which the server hangs up."""
    status, headers, body = await client.answer()
    error = json.loads(body)["error"]
    assert (error["code"], headers["connection"]) == (status, "close")
    assert set(error) == {"message", "type", "param", "code"}
    assert await client.rest() == b""
    return status, headers


# -- heads -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 5_000,
        b"GET / HTTP/1.1\r\n" + b"a" * 5_000,
        b"GET / HTTP/1.1\r\nhost: " + b"a" * 5_000,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1_000,
        b"GET /" + b"a" * 5_000 + b" HTTP/1.1\r\n\r\n",
    ],
    ids=("endless url", "endless name", "endless value", "endless headers", "whole and too long"),
)
@pytest.mark.parametrize("piece_bytes", [100, 10_000])
async def test_a_head_has_a_size(head: bytes, piece_bytes: int) -> None:
    app = Hello()
    async with serving(app, head_bytes_max=2_000) as served:
        client = await served.connect()
        await client.send(GET)
        await client.answer()  # also on a connection that was used before
        for start in range(0, 2_500 if piece_bytes < 2_500 else len(head), piece_bytes):
            await client.send(head[start : start + piece_bytes])
        assert (await refusal(client))[0] == 431
    assert app.asked == 1


async def test_heads_of_one_connection_do_not_add_up() -> None:
    async with serving(Hello(), head_bytes_max=100) as served:
        client = await served.connect()
        for _ in range(20):
            await client.send(GET)
            assert (await client.answer())[0] == 200


@pytest.mark.parametrize("endless", [b"1;" + b"a" * 5_000, b"0\r\nx: " + b"a" * 5_000], ids=("extension", "trailer"))
async def test_what_is_neither_head_nor_body_has_a_size_too(endless: bytes) -> None:
    app = Hello()
    app.may_answer.clear()  # still reading, as far as anybody knows
    async with serving(app, head_bytes_max=2_000) as served:
        client = await served.connect()
        await client.send(POST_CHUNKED)
        await served.until(lambda: app.asked)
        for start in range(0, 2_500, 100):
            await client.send(endless[start : start + 100])
        assert await client.rest() == b""
        app.may_answer.set()


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00", b"HELLO\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n"]
)
async def test_what_is_not_http_is_refused_in_our_shape(garbage: bytes) -> None:
    app = Hello()
    async with serving(app) as served:
        client = await served.connect()
        await client.send(garbage)
        assert (await refusal(client))[0] == 400
    assert app.asked == 0


# -- time --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("begun", [b"", b"G", HALF_A_GET, b"\r\n"], ids=("nothing", "a byte", "half", "empty lines"))
@pytest.mark.parametrize("used_before", [False, True])
async def test_a_head_has_to_arrive(begun: bytes, used_before: bool) -> None:
    async with serving(Hello(), head_ms=10, idle_ms=10) as served:
        client = await served.connect()
        if used_before:
            await client.send(GET)
            await client.answer()
        await client.send(begun)
        assert await client.rest() == b""  # hangs up, or this test never ends


async def test_bytes_in_between_do_not_buy_time() -> None:
    """The head's time runs from its first byte, not from the newest one."""
    async with serving(Hello(), head_ms=50, idle_ms=60_000) as served:
        client = await served.connect()
        await client.send(GET)
        await client.answer()
        await client.send(b"GET / HTTP/1.1\r\n")
        sent = 0
        while not client.reader.at_eof() and sent < 50_000:
            sent += 1
            try:
                await client.send(b"a: b\r\n" if sent % 1_000 == 0 else b"")
            except ConnectionError:
                break
        assert await client.rest() == b""


async def test_a_served_request_is_under_no_limit_of_its_connection() -> None:
    app = Hello()
    app.may_answer.clear()
    async with serving(app, head_ms=5, idle_ms=5) as served:
        client = await served.connect()
        await client.send(GET)
        await served.until(lambda: app.asked)
        slower = await served.connect()
        assert await slower.rest() == b""  # so more than head_ms have passed
        app.may_answer.set()
        assert (await client.answer())[0] == 200


# -- numbers -----------------------------------------------------------------------------------------------------------
async def test_connections_over_the_bound_are_told_and_those_within_are_served() -> None:
    async with serving(Hello(), connections_max=8) as served:
        idle = [await served.connect() for _ in range(8)]
        await served.until(lambda: served.server.connections == 8)
        for _ in range(20):
            status, headers = await refusal(await served.connect())
            assert (status, headers["retry-after"]) == (503, "1")
        await idle[0].send(GET)
        assert (await idle[0].answer())[0] == 200
        idle[1].writer.close()
        await served.until(lambda: served.server.connections == 7)
        late = await served.connect()
        await late.send(GET)
        assert (await late.answer())[0] == 200


async def test_idle_connections_make_room_by_themselves() -> None:
    async with serving(Hello(), connections_max=4, head_ms=10) as served:
        idle = [await served.connect() for _ in range(4)]
        for client in idle:
            assert await client.rest() == b""
        late = await served.connect()
        await late.send(GET)
        assert (await late.answer())[0] == 200


async def test_requests_ahead_of_their_answers_are_few() -> None:
    app = Hello()
    app.may_answer.clear()
    async with serving(app, pipelined_max=4) as served:
        client = await served.connect()
        await client.send(GET * 1_000)
        assert await client.rest() == b""  # one is being answered: nothing may be written into that
        app.may_answer.set()
    assert app.asked <= 5


# -- bodies ------------------------------------------------------------------------------------------------------------
def filled(before: bytes, unit: bytes, after: bytes) -> bytes:
    return before + unit * ((limits.BODY_BYTES_MAX - len(before) - len(after)) // len(unit)) + after


def many_names() -> bytes:
    names = (b'"%x":1' % index for index in range(400_000))
    return (b"{" + b",".join(names) + b"}")[: limits.BODY_BYTES_MAX]


HOSTILE_BODIES = {
    "names": many_names(),
    "one name": filled(b"{", b'"prompt":1,', b'"prompt":1}'),
    "lists": filled(b'{"prompt":[', b"[],", b"[]]}"),
    "objects": filled(b'{"prompt":[', b"{},", b"{}]}"),
    "strings": filled(b'{"prompt":[', b'"",', b'""]}'),
    "ids": filled(b'{"prompt":[', b"1,", b"1]}"),
    "ids in a list": filled(b'{"prompt":[[', b"1,", b"1]]}"),
    "list elsewhere": filled(b'{"prompt":"a","stop":[', b"[],", b"[]]}"),
    "bias": filled(b'{"prompt":"a","logit_bias":{"1":1', b',"1":1', b"}}"),
    "ours": filled(b'{"prompt":"a","triptych":{"a":1', b',"b":1', b"}}"),
    "depth": filled(b'{"prompt":', b"[", b"}"),
    "space": filled(b'{"prompt":"a"', b" ", b"}"),
    "text": filled(b'{"prompt":"', b"a", b'"}'),
    "escapes": filled(b'{"prompt":"', b"\\u00e9", b'"}'),
    "number": filled(b'{"prompt":[', b"1", b"]}"),
    "digits": filled(b'{"prompt":"a","seed":', b"1", b"}"),
}


@pytest.mark.parametrize("name", HOSTILE_BODIES)
async def test_a_hostile_body_takes_little_of_the_loop(name: str) -> None:
    router = Router()
    spent_ms = []
    for _ in range(3):
        started_s = time.process_time()
        with pytest.raises(InvalidArgument):
            await router.validator.completion(HOSTILE_BODIES[name])
        spent_ms.append(1_000 * (time.process_time() - started_s))
    assert min(spent_ms) < REFUSAL_CPU_MS_MAX


async def test_hostile_bodies_over_the_wire_are_refused_one_by_one_and_others_served() -> None:
    router = Router()
    router.core.script = answers([5])

    def post(body: bytes) -> bytes:
        return b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    async with serving(router.app) as served:
        hostile, honest = await served.connect(), await served.connect()
        for body in HOSTILE_BODIES.values():
            await hostile.send(post(body))
            status, _, answer = await hostile.answer()
            error: dict[str, Any] = json.loads(answer)["error"]
            assert (status, error["param"] in ("prompt", "body")) == (400, True)
            await honest.send(post(b'{"prompt":[1]}'))
            assert (await honest.answer())[0] == 200
    assert len(router.core.submits) == len(HOSTILE_BODIES)
