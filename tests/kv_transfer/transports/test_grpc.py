"""What is particular to the gRPC transport: a peer that is not ours, the shared port, connections, and clean-up.

What every transport promises is in tests/contracts/test_links.py.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest

from engine.base import limits
from engine.base.asyncio_host import AsyncioHost
from engine.base.link import Link, LinkHandler
from engine.base.machine import Close, Dial, LinkLost, LinkUp, Received, Send, Started
from kv_transfer.transports.grpc import METHOD, GrpcTransport


class Inbox:
    """A link's listener that can be waited for."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[bytes] = asyncio.Queue()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def on_message(self, message: bytes) -> None:
        self.messages.put_nowait(message)

    def on_lost(self, reason: str) -> None:
        self.lost.set_result(reason)


class Listener:
    """A transport that accepts links, and the inboxes of those it accepted."""

    def __init__(self, config: GrpcTransport.Config | None = None) -> None:
        self.transport = GrpcTransport(config)
        self.inboxes: asyncio.Queue[Inbox] = asyncio.Queue()
        self.transport.listen("127.0.0.1:0", self.accept)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.transport.port}"

    def accept(self, link: Link, hello: bytes) -> LinkHandler:
        inbox = Inbox()
        self.inboxes.put_nowait(inbox)
        return inbox


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    listener = Listener()
    await listener.transport.start()
    yield listener
    await listener.transport.close()


@pytest.fixture
async def dialler() -> AsyncIterator[GrpcTransport]:
    before = asyncio.all_tasks()
    transport = GrpcTransport(GrpcTransport.Config(dial_timeout_ms=100))
    yield transport
    await transport.close()
    before.add(asyncio.current_task())  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        while asyncio.all_tasks() - before:  # noqa: ASYNC110 (grpc.aio unwinds a cancelled call and tells nobody)
            await asyncio.sleep(0)


@pytest.fixture
async def raw_call(listener: Listener) -> AsyncIterator[Any]:
    """A gRPC client that is not ours, with its hello sent."""
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(listener.address, options=options) as channel:
        call: Any = channel.stream_stream(METHOD)()
        await call.write(b"hello")
        yield call


# -- a peer that is not ours -------------------------------------------------------------------------------------------
async def test_a_half_closed_stream_is_over_for_both_ends(listener: Listener, raw_call: Any) -> None:
    inbox = await listener.inboxes.get()
    await raw_call.write(b"last words")
    await raw_call.done_writing()
    assert await inbox.lost == "peer_closed"
    assert inbox.messages.get_nowait() == b"last words"
    assert await raw_call.read() is grpc.aio.EOF


async def test_a_cancelled_stream_is_a_loss(listener: Listener, raw_call: Any) -> None:
    inbox = await listener.inboxes.get()
    raw_call.cancel()
    await inbox.lost


async def test_an_oversized_message_ends_the_link_undelivered(listener: Listener, raw_call: Any) -> None:
    inbox = await listener.inboxes.get()
    await raw_call.write(bytes(limits.MESSAGE_BYTES_MAX + 1))
    await inbox.lost
    assert inbox.messages.empty()


async def test_a_stream_without_a_hello_is_refused_in_time() -> None:
    listener = Listener(GrpcTransport.Config(dial_timeout_ms=50))
    await listener.transport.start()
    async with grpc.aio.insecure_channel(listener.address) as channel:
        call: Any = channel.stream_stream(METHOD)()
        async with asyncio.timeout(5):
            assert await call.code() == grpc.StatusCode.UNAVAILABLE
    assert listener.inboxes.empty()
    await listener.transport.close()


async def test_a_peer_that_accepts_connections_but_never_answers_is_unreachable(dialler: GrpcTransport) -> None:
    """Every dial is a connection of its own, and gives up by itself."""
    connections: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, writer: connections.append(writer), "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    inboxes = [Inbox(), Inbox()]
    for inbox in inboxes:
        dialler.dial(address, b"hello", inbox, lambda: pytest.fail("opened"))
    assert [await inbox.lost for inbox in inboxes] == ["unreachable", "unreachable"]
    assert len(connections) == 2
    for writer in connections:
        writer.close()
    server.close()


async def test_links_over_the_limit_are_refused(dialler: GrpcTransport) -> None:
    listener = Listener(GrpcTransport.Config(links_max=1))
    await listener.transport.start()
    first, second = Inbox(), Inbox()
    opened = asyncio.Event()
    link = dialler.dial(listener.address, b"", first, opened.set)
    await opened.wait()
    dialler.dial(listener.address, b"", second, lambda: pytest.fail("opened"))
    assert await second.lost == "unreachable"
    link.close("make room")
    await (await listener.inboxes.get()).lost
    await listener.transport.close()


async def test_a_handler_that_raises_ends_its_link_and_is_logged(
    dialler: GrpcTransport, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Inbox):
        def on_message(self, message: bytes) -> None:
            raise KeyError("a bug")

    broken, inbox = Broken(), Inbox()
    transport = GrpcTransport()
    transport.listen("127.0.0.1:0", lambda link, hello: broken)
    await transport.start()
    dialler.dial(f"127.0.0.1:{transport.port}", b"", inbox, lambda: None).send(b"poison")
    assert await broken.lost == "handler_failed"
    await inbox.lost
    assert "a bug" in caplog.text
    await transport.close()


# -- the port ----------------------------------------------------------------------------------------------------------
async def test_other_services_share_the_port() -> None:
    async def shout(request: bytes, context: Any) -> bytes:
        return request.upper()

    def register(server: grpc.aio.Server) -> None:
        methods = {"Shout": grpc.unary_unary_rpc_method_handler(shout)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", methods),))

    listener = Listener()
    listener.transport.add_servicers(register)
    await listener.transport.start()
    async with grpc.aio.insecure_channel(listener.address) as channel:
        call: Any = channel.unary_unary("/test.Echo/Shout")
        assert await call(b"hello") == b"HELLO"
    await listener.transport.close()


async def test_an_address_in_use_is_an_error(listener: Listener) -> None:
    second = GrpcTransport()
    second.listen(listener.address, listener.accept)
    with pytest.raises(OSError, match=listener.address):
        await second.start()
    await second.close()


async def test_one_transport_listens_once(listener: Listener) -> None:
    with pytest.raises(RuntimeError, match="already listening"):
        listener.transport.listen("127.0.0.1:0", listener.accept)


# -- lifetimes ---------------------------------------------------------------------------------------------------------
async def test_closing_leaves_no_task_and_no_link(listener: Listener) -> None:
    before = asyncio.all_tasks()
    transport = GrpcTransport()
    inboxes = [Inbox() for _ in range(5)]
    for inbox in inboxes:
        transport.dial(listener.address, b"", inbox, lambda: None).send(b"x")
    far = [await listener.inboxes.get() for _ in inboxes]
    await transport.close()
    assert [await inbox.lost for inbox in inboxes] == ["transport_closed"] * 5
    for inbox in far:
        await inbox.lost
    await listener.transport.close()
    assert not transport._links and not listener.transport._links
    assert asyncio.all_tasks() <= before


async def test_a_peer_that_never_reads_cannot_delay_close(listener: Listener) -> None:
    transport = GrpcTransport(GrpcTransport.Config(linger_ms=50))
    inbox = Inbox()
    link = transport.dial(listener.address, b"", inbox, lambda: None)
    await listener.inboxes.get()
    for far in listener.transport._links:
        far.pause_reading()
    for _ in range(30):
        link.send(bytes(1 << 20))
    async with asyncio.timeout(5):
        await transport.close()
    assert await inbox.lost == "transport_closed"


# -- with hosts --------------------------------------------------------------------------------------------------------
class Scripted:
    next_deadline_us: int | None = None

    def __init__(self, reply: Callable[[Any], Sequence[Any]]) -> None:
        self.step = lambda event, now_us: reply(event)


async def test_two_hosts_talk_over_it(dialler: GrpcTransport) -> None:
    outputs: asyncio.Queue[Any] = asyncio.Queue()

    def client(event: Any) -> Sequence[Any]:
        match event:
            case Started():
                return [Dial("server", address, b"who I am")]
            case LinkUp():
                return [Send("server", b"ping")]
            case Received(message=message):
                return [message, Close("server", "done")]
            case _:
                return [event]

    def server(event: Any) -> Sequence[Any]:
        match event:
            case LinkUp(hello=hello):
                return [hello]
            case Received(link=link):
                return [Send(link, b"pong")]
            case _:
                return [event]

    transport = GrpcTransport()
    server_host = AsyncioHost(Scripted(server), transport, outputs=outputs.put_nowait)
    transport.listen("127.0.0.1:0", server_host.accept)
    await transport.start()
    address = f"127.0.0.1:{transport.port}"
    client_host = AsyncioHost(Scripted(client), dialler, outputs=outputs.put_nowait)
    server_host.start()
    client_host.start()
    async with asyncio.timeout(5):
        seen = [await outputs.get() for _ in range(5)]
    assert seen[:3] == [Started(), b"who I am", b"pong"]
    assert set(seen[3:]) == {LinkLost("server", "done"), LinkLost("in/1", "peer_closed")}
    await client_host.close()
    await server_host.close()
    await transport.close()
