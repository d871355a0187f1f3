"""Keys, tenants and what else callers say in headers."""

import asyncio
import logging
from typing import Any

import msgspec
import pytest

from control_plane.router.access.tenants import EVERYBODY, Keys, Tenant
from control_plane.router.http import app as http
from control_plane.router.http.headers import caller_untrusted, headers_read
from control_plane.router.requests import Cancel, ResetCache
from engine.base import limits
from engine.base.errors import InvalidArgument
from tests.control_plane.router.edge_fakes import Call, Router, answers, body, template, turns

KEYS = Keys({"sk-acme": Tenant("acme"), "sk-bolt": Tenant("bolt"), "sk-ops": Tenant("ops", admin=True)})
WORDS = "authorization: needs 'Bearer KEY' with a key of this server"
CALLS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/abort_requests")
GUARDED = (
    *(("POST", path) for path in (*CALLS, *http.NOT_YET, "/reset_prefix_cache")),
    *(("GET", path) for path in ("/v1/models", "/tokenizer_info", "/load", "/openapi.json", "/v1/completions", "/no")),
)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def locked() -> Router:
    return Router(keys=KEYS, chat=template())


# -- keys --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("headers", [{}, bearer("sk-wrong"), bearer(""), {"authorization": "sk-acme"}])
@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_without_a_key_nothing_is_there(method: str, path: str, headers: dict[str, str]) -> None:
    router = locked()
    answer = await router.request(method, path, headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    error = {"message": WORDS, "type": "AuthenticationError", "param": None, "code": 401}
    assert answer.json() == {"error": error}
    assert router.core.delivered == []


@pytest.mark.parametrize("path", sorted(http.OPEN))
async def test_probes_need_no_key(path: str) -> None:
    assert (await locked().request("GET", path)).status_code == 200


@pytest.mark.parametrize("path", CALLS)
async def test_a_caller_without_a_key_is_refused_before_its_body_is_read(path: str) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"x-request-id", b"mine")]}
    await locked().app(scope | {"query_string": b""}, receive, send)
    assert sent[0]["status"] == 401
    assert dict(sent[0]["headers"])[b"x-request-id"] == b"mine"


async def test_a_key_opens_its_tenants_door() -> None:
    router = locked()
    router.core.script = answers([5])
    for key in ("sk-acme", "sk-bolt"):
        answer = await router.request("POST", "/v1/completions", json={"prompt": [1]}, headers=bearer(key))
        assert answer.status_code == 200
    answer = await router.request(
        "POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]}, headers=bearer("sk-acme")
    )
    assert answer.status_code == 200
    assert [submit.tenant for submit in router.core.submits] == ["acme", "bolt", "acme"]


async def test_a_body_names_no_tenant() -> None:
    router = locked()
    router.core.script = answers([5])
    fields = {"prompt": [1], "tenant": "ops", "user": "ops"}
    await router.request("POST", "/v1/completions", json=fields, headers=bearer("sk-acme"))
    assert router.core.submits[0].tenant == "acme"


async def test_refusals_are_counted_and_logged_without_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    router = locked()
    for key in ("sk-secret", "sk-acme"):
        await router.request("POST", "/v1/completions", json={"temperature": "hot"}, headers=bearer(key))
    refused = [vars(record) for record in caplog.records if record.msg == "request refused"]
    assert [(line["status"], line["tenant"]) for line in refused] == [
        ("unauthenticated", ""),
        ("invalid_argument", "acme"),
    ]
    assert router.sample("triptych_requests_total", outcome="unauthenticated") == 1
    assert "sk-" not in caplog.text + str(refused)


async def test_the_admin_port_asks_for_no_key() -> None:
    router = locked()
    assert (await router.request("GET", "/admin/v1/workers", admin=True)).status_code == 200
    assert (await router.request("POST", "/reset_prefix_cache", admin=True)).status_code == 200


# -- what a tenant may do ----------------------------------------------------------------------------------------------
async def test_only_administrators_reset_the_cache() -> None:
    router = locked()
    refused = await router.request("POST", "/reset_prefix_cache", headers=bearer("sk-acme"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "PermissionDeniedError")
    assert router.core.delivered == []
    assert (await router.request("POST", "/reset_prefix_cache", headers=bearer("sk-ops"))).status_code == 200
    assert router.core.delivered == [ResetCache()]


@pytest.mark.parametrize(("key", "ends"), [("sk-acme", True), ("sk-bolt", False), ("sk-ops", True)])
async def test_a_tenant_aborts_its_own_requests_and_an_administrator_anybodys(key: str, ends: bool) -> None:
    router = locked()
    call = Call(router.app, body(), [(b"authorization", b"Bearer sk-acme")])
    await turns()
    ids = {"request_ids": ["cmpl-id1"]}
    answer = await router.request("POST", "/abort_requests", json=ids, headers=bearer(key))
    assert (answer.status_code, answer.content) == (200, b"")  # whose request it is is nobody else's business
    await turns()
    assert router.core.cancels == ([Cancel(1)] if ends else [])
    call.disconnect()
    await call.task


# -- headers -----------------------------------------------------------------------------------------------------------
async def ask(router: Router, *headers: tuple[bytes, bytes], **fields: Any) -> tuple[int, dict[bytes, bytes], Any]:
    call = Call(router.app, body(stream=False, **fields), headers)
    await call.task
    start = call.sent[0]
    return start["status"], dict(start["headers"]), msgspec.json.decode(call.body)


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize(
    "value",
    [b"", b"0", b"-1", b"+1", b"1.5", b"1e3", b" 1", b"1_0", b"x", b"\xb2", b"9" * 5_000, b"600001", b"1\r\nx: y"],
)
async def test_a_wrong_slo_is_refused_by_the_headers_name(name: str, value: bytes) -> None:
    router = Router()
    status, _, answer = await ask(router, (name.encode(), value))
    assert (status, answer["error"]["param"]) == (400, name)
    assert answer["error"]["message"] == f"{name}: must be an integer from 1 to {limits.SLO_MS_MAX}"
    assert router.core.delivered == []


async def test_slos_of_headers_are_the_callers_unless_the_body_has_its_own() -> None:
    router = Router()
    router.core.script = answers([5])
    await ask(router, (b"x-slo-ttft-ms", b"250"), (b"x-slo-tpot-ms", b"600000"))
    await ask(router, (b"x-slo-ttft-ms", b"250"), triptych={"slo": {"ttft_ms": 90}})
    assert [submit.ttft_slo_ms for submit in router.core.submits] == [250, 90]


async def test_of_a_header_that_came_twice_the_first_counts() -> None:
    router = locked()
    router.core.script = answers([5])
    twice = [(b"authorization", b"Bearer sk-acme"), (b"authorization", b"Bearer sk-ops"), (b"x-request-id", b"a")]
    status, headers, _ = await ask(router, *twice, (b"x-request-id", b"b"), (b"x-slo-ttft-ms", b"5"))
    assert (status, headers[b"x-request-id"], router.core.submits[0].tenant) == (200, b"a", "acme")


@pytest.mark.parametrize("value", [b"Bearer \r\nx: sk-acme", b"\xff\xfe", b"Bearer " + b"k" * 10_000, b"bearer"])
async def test_strange_authorizations_are_wrong_keys(value: bytes) -> None:
    assert (await ask(locked(), (b"authorization", value)))[0] == 401


def test_a_caller_is_what_the_headers_say() -> None:
    headers = headers_read([(b"x-request-id", b"a b"), (b"x-slo-ttft-ms", b"1"), (b"x-slo-tpot-ms", b"7"), (b"z", b"")])
    caller = caller_untrusted(headers, EVERYBODY, arrived_us=9)
    assert (caller.label, caller.arrived_us, caller.tenant) == ("a_b", 9, EVERYBODY)
    assert (caller.ttft_slo_ms, caller.tpot_slo_ms) == (1, 7)
    assert caller_untrusted({}, EVERYBODY, 0).ttft_slo_ms is None
    with pytest.raises(InvalidArgument, match="x-slo-ttft-ms"):
        caller_untrusted({b"x-slo-ttft-ms": b"no"}, EVERYBODY, 0)


async def test_nobody_is_left_waiting_by_a_refusal() -> None:
    router = locked()
    calls = [Call(router.app, body(), [(b"authorization", b"Bearer no")]) for _ in range(20)]
    await asyncio.gather(*(call.task for call in calls))
    assert {call.sent[0]["status"] for call in calls} == {401} and router.edge.in_flight == 0
