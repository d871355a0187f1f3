"""The gRPC transport: a link is one bidirectional stream of `/triptych.v1.Links/Open` on a connection of its own.

The first message of the dialler is the hello; every further message, both ways, is one message of the link, as bytes:
no serialiser, no envelope. Each dial opens its own channel (no shared subchannels), hence its own TCP connection, so
that a link full of KV never delays a link full of tokens (DESIGN 3).

Each open link has two tasks, a reader and a writer, owned by the task of its RPC, which the transport owns. The reader
hands messages over by direct call; the writer drains a queue bounded in messages and in bytes. A peer that does not
read stalls the writer through HTTP/2 flow control, the queue fills, and the link is lost as a slow reader.

Not here: reconnecting, retrying, keep-alive policy (hosts and machines), and what a message means.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from engine.base import limits
from engine.base.keepalive import KeepAliveListener
from engine.base.link import Accept, LinkHandler
from kv_transfer.transports import PEER_CLOSED, RESET, SLOW_READER, UNREACHABLE, is_slow_reader, require_sendable

_aio: Any = grpc.aio  # grpc ships no types, and the community's know neither EOF nor streams without serialisers
logger = logging.getLogger(__name__)

SERVICE = "triptych.v1.Links"
METHOD = f"/{SERVICE}/Open"

Read = Callable[[], Awaitable[Any]]  # bytes, or EOF
Write = Callable[[bytes], Awaitable[None]]
HangUp = Callable[[], Awaitable[None]]
Register = Callable[[grpc.aio.Server], None]
"""Adds a servicer: `lambda server: add_InferenceServicer_to_server(servicer, server)`."""

_MESSAGE_OPTIONS = (
    ("grpc.max_receive_message_length", limits.MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", limits.MESSAGE_BYTES_MAX),
)
# HTTP/2 pings only reap connections whose other end is gone without a word (power loss); links have keep-alives of
# their own, which prove more: that the peer's event loop runs.
_PING_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_CHANNEL_OPTIONS = (
    *_MESSAGE_OPTIONS,
    *_PING_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),  # one link, one connection
    ("grpc.enable_retries", 0),  # a link is not a call that could be repeated
    ("grpc.enable_http_proxy", 0),  # workers reach each other directly, whatever http_proxy says
)
_SERVER_OPTIONS = (
    *_MESSAGE_OPTIONS,
    *_PING_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # two workers on one port must fail, not share its connections
)


class GrpcTransport:
    """Dials links and serves them, beside whatever other servicers share the port. One per process."""

    @dataclass(frozen=True, slots=True)
    class Config:
        dial_timeout_ms: int = limits.DIAL_TIMEOUT_MS
        linger_ms: int = limits.KEEPALIVE_INTERVAL_MS  # what was sent before `close` has this long to leave
        links_max: int = 4 * limits.WORKERS_MAX  # control and bulk, in and out, with every possible peer

    def __init__(self, config: Config | None = None) -> None:
        self._config = config or self.Config()
        self._dial_timeout_s = self._config.dial_timeout_ms / 1000
        self._linger_s = self._config.linger_ms / 1000
        self._accept: Accept | None = None
        self._address: str | None = None
        self._registers: list[Register] = []
        self._server: grpc.aio.Server | None = None
        self._links: dict[_GrpcLink, None] = {}
        self._dialling: set[asyncio.Task[None]] = set()  # one per dialled link, for as long as it lives
        self.port: int | None = None  # bound by `start`; tells what ":0" became

    # -- Transport -----------------------------------------------------------------------------------------------------
    def listen(self, address: str, accept: Accept) -> None:
        """Takes effect with `start`. One address: a process has one gRPC port."""
        if self._address is not None:
            raise RuntimeError(f"already listening at {self._address}")
        self._address, self._accept = address, accept

    def dial(self, address: str, hello: bytes, handler: LinkHandler, on_open: Callable[[], None]) -> "_GrpcLink":
        link = _GrpcLink()
        link.attach(handler)
        self._links[link] = None
        task = asyncio.get_running_loop().create_task(self._converse_as_dialler(link, address, hello, on_open))
        self._dialling.add(task)
        task.add_done_callback(self._dialling.discard)
        return link

    # -- lifetime ------------------------------------------------------------------------------------------------------
    def add_servicers(self, register: Register) -> None:
        """More services on the same port (inference, health, reflection). Before `start`."""
        self._registers.append(register)

    async def start(self) -> None:
        """Serve, if told to listen. Raises OSError when the address cannot be bound."""
        if self._address is None:
            return
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        handlers: dict[str, Any] = {"Open": grpc.stream_stream_rpc_method_handler(self._converse_as_listener)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        for register in self._registers:
            register(self._server)
        self.port = _bind(self._server, self._address)
        await self._server.start()

    async def close(self, grace_ms: int | None = None) -> None:
        """End every link, then serve no more. Calls still running after the grace (the linger time) are cancelled."""
        grace_ms = self._config.linger_ms if grace_ms is None else grace_ms
        for link in tuple(self._links):
            link.close("transport_closed")
        if self._dialling:
            _, late = await asyncio.wait(self._dialling, timeout=grace_ms / 1000)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(grace_ms / 1000)
            self._server = None

    # -- the dialling end ----------------------------------------------------------------------------------------------
    async def _converse_as_dialler(
        self, link: "_GrpcLink", address: str, hello: bytes, on_open: Callable[[], None]
    ) -> None:
        try:
            async with grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
                call = _open_stream(channel)
                if await self._is_accepted(call, hello) and not link.ended:
                    on_open()
                    await link.converse(call.read, call.write, call.done_writing, self._linger_s)
        finally:
            link.end(UNREACHABLE)  # if nothing else has
            del self._links[link]

    async def _is_accepted(self, call: Any, hello: bytes) -> bool:
        """Whether the peer answered the hello (with its initial metadata) in time."""
        try:
            async with asyncio.timeout(self._dial_timeout_s):
                await call.write(hello)
                await call.initial_metadata()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, TimeoutError):
            return False
        return not call.done()

    # -- the accepting end ---------------------------------------------------------------------------------------------
    async def _converse_as_listener(self, _: Any, context: Any) -> None:
        hello = await self._read_hello(context.read)
        if self._accept is None or hello is None or len(self._links) >= self._config.links_max:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not accepted")
            return
        link = _GrpcLink()
        self._links[link] = None
        try:
            link.attach(self._accept(link, hello))
            await context.send_initial_metadata(())
            await link.converse(context.read, context.write, None, self._linger_s)
        finally:
            link.end(RESET)  # if nothing else has: the call was cancelled under us
            del self._links[link]

    async def _read_hello(self, read: Read) -> bytes | None:
        try:
            async with asyncio.timeout(self._dial_timeout_s):
                hello = await read()
        except TimeoutError:
            return None
        return None if hello is _aio.EOF else bytes(hello)


class _GrpcLink:
    """One end of a link, dialled or accepted: a bounded queue out, direct calls in, one loss."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._handler: LinkHandler | None = None
        self._listener: KeepAliveListener | None = None
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._wake_writer = asyncio.Event()
        self._reading = asyncio.Event()
        self._reading.set()
        self._over = asyncio.Event()
        self._flushes = False  # our own orderly close: what is queued shall still leave
        self.ended = False

    def attach(self, handler: LinkHandler) -> None:
        self._handler = handler
        self._listener = handler if isinstance(handler, KeepAliveListener) else None

    # -- Link ----------------------------------------------------------------------------------------------------------
    def send(self, message: bytes) -> None:
        require_sendable(message)
        if self.ended:
            return
        self._unsent.append(message)
        self._unsent_bytes += len(message)
        self._wake_writer.set()
        if is_slow_reader(len(self._unsent), self._unsent_bytes):
            self.end(SLOW_READER)

    def close(self, reason: str) -> None:
        if not self.ended:
            self._flushes = True
            self.end(reason)

    def pause_reading(self) -> None:
        """Take nothing more from the connection: HTTP/2 flow control then stalls the peer."""
        self._reading.clear()

    def resume_reading(self) -> None:
        self._reading.set()

    # -- the conversation ----------------------------------------------------------------------------------------------
    def end(self, reason: str) -> None:
        """The link is over for this end; the first reason counts. `on_lost` follows from the loop, never from here."""
        if self.ended:
            return
        self.ended = True
        self._over.set()
        self._wake_writer.set()
        self._reading.set()
        self._loop.call_soon(self._report, reason)

    async def converse(self, read: Read, write: Write, hang_up: HangUp | None, linger_s: float) -> None:
        """Both directions until either ends. Owns the reader and the writer."""
        reader = self._loop.create_task(self._read_all(read))
        writer = self._loop.create_task(self._write_all(write))
        try:
            await self._over.wait()
            if self._flushes:
                await self._linger(reader, writer, hang_up, linger_s)
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _linger(
        self, reader: asyncio.Task[None], writer: asyncio.Task[None], hang_up: HangUp | None, linger_s: float
    ) -> None:
        """Let queued messages leave. Only a dialler hangs up and waits: a listener ends the call by returning."""
        with contextlib.suppress(Exception):  # whatever goes wrong now, the link is over and its loss reported
            async with asyncio.timeout(linger_s):
                await writer
                if hang_up is not None:
                    await hang_up()
                    await reader

    async def _read_all(self, read: Read) -> None:
        try:
            await self._reading.wait()
            while (message := await read()) is not _aio.EOF:
                self._take(message)
                if not self._reading.is_set():
                    await self._reading.wait()
            self.end(PEER_CLOSED)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            self.end(RESET)
        except Exception:
            logger.exception("a link's handler raised")
            self.end("handler_failed")
        finally:
            self.end(RESET)  # cancelled under us

    def _take(self, message: bytes) -> None:
        if self.ended or self._handler is None:
            return
        if message:
            self._handler.on_message(message)
        elif self._listener is not None:
            self._listener.on_keepalive()

    async def _write_all(self, write: Write) -> None:
        try:
            while self._unsent or not self.ended:
                if self._unsent:
                    message = self._unsent.popleft()
                    await write(message)
                    self._unsent_bytes -= len(message)
                else:
                    self._wake_writer.clear()
                    await self._wake_writer.wait()
        except Exception as error:  # grpc raises a handful of types here; all of them mean that the call is over
            logger.debug("link write failed: %r", error)
            self.end(RESET)

    def _report(self, reason: str) -> None:
        self._unsent_bytes = 0
        if self._handler is not None:
            self._handler.on_lost(reason)


def _open_stream(channel: Any) -> Any:
    return channel.stream_stream(METHOD)()


def _bind(server: grpc.aio.Server, address: str) -> int:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen at {address}") from error
    if port == 0:
        raise OSError(f"cannot listen at {address}")
    return port
