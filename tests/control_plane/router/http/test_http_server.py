"""A server on a socket that is already open: serving, stopping gently and by force, the process's limits."""

import asyncio
import resource
import signal
import socket
from typing import Any

import pytest

from control_plane.router.http.server import raise_open_files_limit
from tests.control_plane.router.http_fakes import GET, Hello, serving


async def test_one_connection_serves_several_requests() -> None:
    async with serving(Hello()) as served:
        client = await served.connect()
        for _ in range(3):
            await client.send(GET)
            status, headers, body = await client.answer()
            assert (status, body) == (200, b"hello") and "server" not in headers and headers["date"].endswith("GMT")
        assert served.server.connections == 1


async def test_a_token_does_not_wait_for_the_acknowledgement_of_the_one_before() -> None:
    async with serving(Hello()) as served:
        await served.connect()
        await served.until(lambda: served.server.connections)
        (connection,) = served.server._server.server_state.connections
        assert connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_requests_sent_ahead_are_answered_in_order() -> None:
    app = Hello()
    async with serving(app) as served:
        client = await served.connect()
        await client.send(GET * 3)
        assert [(await client.answer())[0] for _ in range(3)] == [200, 200, 200]


async def test_signals_stay_with_the_process() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    async with serving(Hello()) as served:
        await served.connect()
        await served.until(lambda: served.server.connections)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


async def test_stopping_lets_an_answer_end_and_hangs_up_on_the_idle() -> None:
    app = Hello()
    app.may_answer.clear()
    async with serving(app) as served:
        idle, busy = await served.connect(), await served.connect()
        await busy.send(GET)
        await served.until(lambda: app.asked)
        served.server.stop()
        assert await idle.rest() == b""
        app.may_answer.set()
        assert (await busy.answer())[2] == b"hello"
        assert await busy.rest() == b""
        await served.task
        with pytest.raises(ConnectionRefusedError):
            await served.connect()


async def test_an_answer_that_does_not_end_is_cut_off_when_the_patience_of_stopping_is() -> None:
    app = Hello()
    app.may_answer.clear()
    async with serving(app, stop_ms=1) as served:
        client = await served.connect()
        await client.send(GET)
        await served.until(lambda: app.asked)
        served.server.stop()
        await served.task
        await client.rest()


async def test_stopping_by_force_waits_for_nobody() -> None:
    app = Hello()
    app.may_answer.clear()
    async with serving(app) as served:
        client = await served.connect()
        await client.send(GET)
        await served.until(lambda: app.asked)
        served.server.stop(force=True)
        assert await client.rest() == b""
        app.may_answer.set()
        await served.task


async def test_cancelling_is_stopping_by_force() -> None:
    async with serving(Hello()) as served:
        client = await served.connect()
        await client.send(GET)
        await client.answer()
        served.task.cancel()
        assert await client.rest() == b""
        assert served.server.connections == 0


async def test_an_upgrade_is_an_ordinary_request_and_the_last_one() -> None:
    async with serving(Hello()) as served:
        client = await served.connect()
        await client.send(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert await client.rest() == b""


async def test_who_does_not_take_the_end_of_an_answer_is_cut_off() -> None:
    async def endless(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(32 << 20)})

    async with serving(endless, linger_ms=10) as served:
        client = await served.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.send(GET)
        await served.until(lambda: served.server.connections)
        await served.until(lambda: not served.server.connections)


async def test_who_reads_nothing_of_a_large_answer_is_cut_off() -> None:
    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(16):  # each waits until the one before is taken, or the connection gone
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async with serving(large, stall_ms=20) as served:
        client = await served.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]  # asyncio's stream reads ahead by itself
        await client.send(GET)
        await served.until(lambda: served.server.connections)
        await served.until(lambda: not served.server.connections)


async def test_a_failing_application_costs_its_own_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("bug")

    async with serving(broken) as served:
        for _ in range(2):
            client = await served.connect()
            await client.send(GET)
            assert (await client.answer())[0] == 500
            assert await client.rest() == b""


@pytest.mark.parametrize(
    ("soft", "hard", "raised_to"),
    [
        (1_024, 1 << 20, 65_536),
        (1_024, 4_096, 4_096),
        (1_024, resource.RLIM_INFINITY, 65_536),
        (1 << 20, 1 << 20, None),
        (1_024, 1_024, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None),
    ],
)
def test_the_limit_on_open_files_only_rises(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised_to: int | None
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append(limits))
    assert raise_open_files_limit() == (raised_to or soft)
    assert asked == ([(raised_to, hard)] if raised_to else [])


async def test_connections_that_end_are_not_counted() -> None:
    async with serving(Hello()) as served:
        clients = await asyncio.gather(*(served.connect() for _ in range(10)))
        await served.until(lambda: served.server.connections == 10)
        for client in clients:
            client.writer.close()
        await served.until(lambda: served.server.connections == 0)
