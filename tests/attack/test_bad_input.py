"""Attack: bad requests against the whole edge. Each gets the one right answer, and nothing else happens.

Nothing else: no worker hears of it, nothing that the client wrote comes back or is logged, the next good request is
served, and it cost next to nothing. `bad_requests` has the table.
"""

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from bench.router_cost import allowance, yardstick_us
from control_plane.router.access.tenants import Keys, Tenant
from control_plane.router.http.app import OPEN
from control_plane.router.text.chat_template import ChatTemplate
from control_plane.router.text.vocabulary import ModelCard
from engine.base import limits
from engine.grammar import check_constraint
from engine.types import Constraint
from tests.attack.bad_requests import GROUPS, MARK, ODD, PATHS, Bad, table
from tests.control_plane.router.edge_fakes import CARD, Router, answers
from tests.control_plane.router.http_fakes import serving

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
}
GOOD = Bad(row="", name="good", body=b'{"prompt":[1,2,3]}', message="", param=None, status=200)
REFUSAL_CPU_MS_MAX = 2.0
LARGE_BYTES = 64 << 10  # a longer body takes its time to be read: once, and no more
# A thousand small objects: 2.2 ms per MiB in a process of its own, 3.6 in one whose memory 7,000 tests have used.
LARGE_REFUSAL_CPU_MS_PER_MIB = 5.0
FEW_TRIES, TRIES = 3, 20  # neighbours on the machine disturb


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


async def ask(app: Any, request: Bad) -> Reply:
    """One request in ASGI's own messages: what a client library costs is not ours."""
    sent: list[dict[str, Any]] = []
    inbox = iter([{"type": "http.request", "body": request.body, "more_body": False}])
    never = asyncio.Event()

    async def receive() -> dict[str, Any]:
        for message in inbox:
            return message
        await never.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope(request), receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Reply(sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:]))


def scope(request: Bad) -> dict[str, Any]:
    return {
        "type": "http",
        "http_version": "1.1",
        "scheme": "http",
        "method": request.method,
        "path": request.path,
        "raw_path": request.path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *request.headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }


class Strict(Router):
    """The edge, with the real compiler of constraints."""

    def check_constraint(self, constraint: Constraint) -> None:
        check_constraint(constraint)


TEMPLATE = """
{%- for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


@functools.cache
def template() -> ChatTemplate:
    return ChatTemplate(TEMPLATE)


def router(keys: Keys | None = None, card: ModelCard = CARD) -> Router:
    made = Strict(card, keys=keys, chat=template())
    made.core.script = answers([5])
    return made


def expected(bad: Bad) -> tuple[int, Any]:
    return bad.status, {
        "error": {"message": bad.message, "type": TYPES[bad.status], "param": bad.param, "code": bad.status}
    }


async def told(served: Router, bad: Bad) -> tuple[int, Any]:
    """What the client reads. Nothing of it is the client's own."""
    reply = await ask(served.app, bad)
    assert MARK not in f"{reply.headers} {reply.body!r}", bad.name
    return reply.status, json.loads(reply.body or b"null")


async def differences(served: Router, table: Iterable[Bad]) -> dict[str, Any]:
    """By name: what was told instead."""
    return {bad.name: got for bad in table if (got := await told(served, bad)) != expected(bad)}


def logged(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(str(vars(record)) for record in caplog.records)


# -- each --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("group", GROUPS)
async def test_each_bad_request_gets_the_one_right_answer(group: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = router()
    assert await differences(served, GROUPS[group]()) == {}
    assert served.core.delivered == []  # no worker was touched
    assert served.edge.in_flight == 0
    assert MARK not in logged(caplog)


async def test_the_next_good_request_is_served() -> None:
    served = router()
    for bad in table():
        await ask(served.app, bad)
        assert (await ask(served.app, GOOD)).status == 200, bad.name
    assert len(served.core.submits) == len(table())
    assert served.edge.in_flight == 0


@pytest.mark.parametrize("name", ODD)
async def test_what_only_looks_wrong_is_served(name: str) -> None:
    served = router()
    reply = await ask(served.app, replace(GOOD, body=ODD[name]))
    assert (reply.status, served.edge.in_flight) == (200, 0), reply.body


def test_the_table_is_long_and_names_nothing_twice() -> None:
    names = [bad.name for bad in table()]
    assert len(names) >= 300
    assert [name for name, count in Counter(names).items() if count > 1] == []


# -- keys --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", [path for path in PATHS if path not in OPEN])
async def test_without_a_key_of_ours_nothing_else_is_looked_at(path: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = router(Keys({"sk-right": Tenant("acme")}))
    message = "authorization: needs 'Bearer KEY' with a key of this server"
    rows = [
        Bad(
            row="E13",
            name=repr(key),
            path=path,
            method=PATHS[path],
            body=body,
            headers=key,
            message=message,
            param=None,
            status=401,
        )
        for key, body in itertools.product(NO_KEYS, (GOOD.body, b"", b"{", b'{"prompt":' + b"[" * 5_000))
    ]
    assert await differences(served, rows) == {}
    assert served.core.delivered == []
    assert MARK not in logged(caplog)
    reply = await ask(served.app, rows[0])
    assert reply.headers["www-authenticate"] == "Bearer"


NO_KEYS = (
    (),
    *(
        ((b"authorization", value),)
        for value in (
            *(b"", b"Bearer", b"Bearer ", b"Basic c2stcmlnaHQ=", b"sk-right", b"bearersk-right", b"Bearer sk-righ"),
            *(b"Bearer sk-right2", b"Bearer SK-RIGHT", f"Bearer {MARK}".encode(), b"Bearer \x00", b"Bearer \xff\xfe"),
            *(b"Bearer " + b"a" * 30_000, b"Bearer sk-right,sk-right", b"Token sk-right"),
        )
    ),
    ((b"x-api-key", b"sk-right"),),
    ((b"authorization", f"Bearer {MARK}".encode()), (b"authorization", b"Bearer sk-right")),  # the first one counts
)


# -- bytes around the body ---------------------------------------------------------------------------------------------
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
REFUSED_HEADS = {
    "negative length": (400, HEAD + b"content-length: -1\r\n\r\n"),
    "length in words": (400, HEAD + f"content-length: {MARK}\r\n\r\n".encode()),
    "length in hexadecimal": (400, HEAD + b"content-length: 0x10\r\n\r\n"),
    "huge length": (400, HEAD + b"content-length: 99999999999999999999999\r\n\r\n"),
    "two lengths": (400, HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}"),
    "length and chunks": (400, HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    "no colon": (400, HEAD + MARK.encode() + b"\r\n\r\n"),
    "space before the colon": (400, HEAD + b"content-length : 2\r\n\r\n{}"),
    "NUL in a header": (400, HEAD + b"x-request-id: a\0b\r\n\r\n"),
    "1 MB of headers": (431, HEAD + b"x: " + b"y" * 1_000_000 + b"\r\n\r\n"),
    "10^5 headers": (431, HEAD + b"x: y\r\n" * 100_000 + b"\r\n"),
}


@pytest.mark.parametrize("name", REFUSED_HEADS)
async def test_a_bad_head_is_refused_in_our_shape(name: str) -> None:
    status, head = REFUSED_HEADS[name]
    made = router()
    async with serving(made.app) as served:
        client = await served.connect()
        with contextlib.suppress(ConnectionError):  # refused before it was all sent
            await client.send(head)
        answered, _, body = await client.answer()
        assert (answered, json.loads(body)["error"]["code"]) == (status, status)
        assert MARK.encode() not in body
        good = await served.connect()
        await good.send(HEAD + b"content-length: %d\r\n\r\n" % len(GOOD.body) + GOOD.body)
        assert (await good.answer())[0] == 200
    assert len(made.core.submits) == 1


async def test_a_body_has_a_size() -> None:
    served = router()
    reply = await ask(served.app, replace(GOOD, body=b'{"prompt":"' + b"a" * limits.BODY_BYTES_MAX + b'"}'))
    message = f"body: at most {limits.BODY_BYTES_MAX} bytes"
    assert (reply.status, json.loads(reply.body)["error"]["message"]) == (413, message)
    assert reply.headers["connection"] == "close"
    assert served.core.delivered == []


@pytest.mark.parametrize(
    "rest",
    [
        b"content-length: 100\r\n\r\n" + GOOD.body,
        b"transfer-encoding: chunked\r\n\r\n12\r\n" + GOOD.body + b"\r\n",
        b"transfer-encoding: chunked\r\n\r\nfar too long\r\n",
    ],
    ids=("shorter than it says", "no last chunk", "no chunk"),
)
async def test_a_body_that_never_ends_well_is_no_request(rest: bytes) -> None:
    made = router()
    async with serving(made.app) as served:
        client = await served.connect()
        await client.send(HEAD + rest)
        client.writer.write_eof()
        assert await client.rest() == b""
    assert made.core.delivered == []


# -- names that clients give -------------------------------------------------------------------------------------------
FORGERIES = (
    b"a\r\nx-evil: 1",
    b"a\ninfo forged line",
    b"\x1b[31mred",
    b"a b=c",
    "\u2028".encode(),
    b"\xff\xfe",
    b"a" * 10_000,
)


@pytest.mark.parametrize("forged", FORGERIES, ids=repr)
async def test_a_name_forges_no_header_and_no_line_of_a_log(forged: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = router()
    for body in (GOOD.body, b"{"):
        reply = await ask(served.app, replace(GOOD, body=body, headers=((b"x-request-id", forged),)))
        label = reply.headers["x-request-id"]
        assert len(label) <= limits.REQUEST_ID_CHARACTERS_MAX
        assert re.fullmatch(r"[!-~]*", label)
        assert "x-evil" not in reply.headers
    labels = {record.label for record in caplog.records if hasattr(record, "label")}
    assert labels
    assert all(re.fullmatch(r"[!-~]*", label) for label in labels)


async def test_one_name_twice_at_once_is_two_requests() -> None:
    """From two tenants: a name is a label, never a key (D15)."""
    served = router(Keys({"sk-one": Tenant("one"), "sk-two": Tenant("two")}))
    named = [
        replace(GOOD, headers=((b"authorization", key), (b"x-request-id", b"same")))
        for key in (b"Bearer sk-one", b"Bearer sk-two")
    ]
    replies = await asyncio.gather(*(ask(served.app, request) for request in named))
    assert [reply.status for reply in replies] == [200, 200]
    assert len({json.loads(reply.body)["id"] for reply in replies}) == 2
    assert [submit.tenant for submit in served.core.submits] == ["one", "two"]


# -- what a refusal costs ----------------------------------------------------------------------------------------------
async def test_a_refusal_costs_next_to_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bads = {bad.name: bad for bad in table()}
    costs_ms = await refusals_cpu_ms(bads.values())
    small_ms = {name: cost_ms for name, cost_ms in costs_ms.items() if len(bads[name].body) <= LARGE_BYTES}
    large_ms = {name: cost_ms for name, cost_ms in costs_ms.items() if name not in small_ms}
    with capsys.disabled():
        print(f"\n{len(small_ms)} refusals: median {statistics.median(small_ms.values()):.2f} ms of CPU, the slowest:")
        for name, cost_ms in slowest(small_ms) + slowest(large_ms):
            print(f"  {cost_ms:7.2f} ms  {name}")
    slower = allowance(await yardstick_us())  # this machine, now: see bench.router_cost
    assert {name: cost_ms for name, cost_ms in costs_ms.items() if cost_ms > slower * cpu_ms_max(bads[name])} == {}


def cpu_ms_max(bad: Bad) -> float:
    size_bytes = len(bad.body)
    return REFUSAL_CPU_MS_MAX + (LARGE_REFUSAL_CPU_MS_PER_MIB * size_bytes / (1 << 20)) * (size_bytes > LARGE_BYTES)


async def refusals_cpu_ms(bads: Iterable[Bad]) -> dict[str, float]:
    """Of all threads, for some checks leave the event loop. The best of a few tries, or of more until it is enough."""
    served = router()
    costs_ms: dict[str, float] = {}
    for bad in bads:
        best_ms = math.inf
        for attempt in range(TRIES):
            started_s = time.process_time()
            await ask(served.app, bad)
            best_ms = min(best_ms, 1_000 * (time.process_time() - started_s))
            if attempt + 1 >= FEW_TRIES and best_ms <= cpu_ms_max(bad):
                break
        costs_ms[bad.name] = best_ms
    return costs_ms


def slowest(costs_ms: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(costs_ms.items(), key=lambda cost: -cost[1])[:10]
