"""One listening socket, one ASGI application, and clients who may be anybody: uvicorn with bounds of our own.

    HttpServer --serves--> uvicorn.Server --per connection--> BoundedConnection --requests--> the application

Bounded here: connections, bytes and time of a request's head, requests sent ahead, idleness, and how long a client may
leave the end of an answer unread. A refusal is our JSON if nothing else is being sent, otherwise the connection ends.
Nothing here costs anything per streamed token: uvicorn's own `send` is untouched. An idle server sleeps.

What does not belong here: bodies and answers (`app`, `generation`), signals and the order of stopping (the process).
"""

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import httptools
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from control_plane.router.http.responses import encode_json, error_value, retry_after
from engine.base import limits

DATE_S: Final = 1.0  # how long the `date` header stays as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    connections_max: int = limits.HTTP_CONNECTIONS_MAX
    backlog: int = limits.HTTP_BACKLOG
    head_bytes_max: int = limits.HTTP_HEAD_BYTES_MAX
    head_ms: int = limits.HTTP_HEAD_MS
    idle_ms: int = limits.HTTP_IDLE_MS
    linger_ms: int = limits.HTTP_LINGER_MS
    stall_ms: int = limits.HTTP_STALL_MS
    stop_ms: int = limits.HTTP_STOP_MS
    pipelined_max: int = limits.HTTP_PIPELINED_MAX


class HttpServer:
    """Serves from an open socket until `stop`. The socket is closed with it."""

    def __init__(
        self,
        app: ASGIApp,
        listening_socket: socket.socket,
        config: Config | None = None,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        config = config or Config()
        self._socket = listening_socket
        self._server = _Server(
            uvicorn.Config(
                app,
                http=cast("type[asyncio.Protocol]", partial(BoundedConnection, bounds=config)),
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # whose word for the client's address nobody here asks for
                backlog=config.backlog,
                timeout_graceful_shutdown=cast("int", config.stop_ms / 1000),
                ssl_context_factory=None if tls is None else lambda *_: tls,
            ),
            config,
        )

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    async def serve(self) -> None:
        """Returns after `stop`, when every connection is closed. Cancelling it is stopping by force."""
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            self._cut_off()
            self._socket.close()

    def stop(self, *, force: bool = False) -> None:
        """Accept nothing more and let answers under way end, but not by force: then connections end as they are."""
        self._server.leave(force=force)
        if force:
            self._cut_off()

    def _cut_off(self) -> None:
        for connection in tuple(self._server.server_state.connections):
            cast("BoundedConnection", connection).transport.abort()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, for the process has one owner of signals, and without its looking ten
    times a second whether it should exit: waking an idle process costs more than some tokens do."""

    def __init__(self, config: uvicorn.Config, bounds: Config) -> None:
        super().__init__(config)
        self._bounds = bounds
        self._leaving = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's for sockets that are open, with bounds on TLS, which comes before anything that connections
        bound: asyncio would wait a minute for a client that never says hello."""
        config, bounds, loop = self.config, self._bounds, asyncio.get_running_loop()
        protocol = partial(
            cast("Any", config.http_protocol_class), config=config, server_state=self.server_state, app_state={}
        )
        tls: dict[str, Any] = {}
        if config.ssl is not None:
            times_s = {"ssl_handshake_timeout": bounds.head_ms / 1000, "ssl_shutdown_timeout": bounds.linger_ms / 1000}
            tls = {"ssl": config.ssl, **times_s}
        self.servers = [
            await loop.create_server(protocol, sock=listening, backlog=config.backlog, **tls)
            for listening in sockets or ()
        ]
        self.started = True

    def leave(self, *, force: bool) -> None:
        self.should_exit = True
        self.force_exit = self.force_exit or force
        self._leaving.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # refreshes the `date` header
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DATE_S):
                    await self._leaving.wait()


class BoundedConnection(HttpToolsProtocol):
    """One client's connection.

    Time: a connection either waits for a head, or serves requests, or is closing. `_limit` is the one timer for the
    first and the last; uvicorn's own keep-alive timer runs in between requests; the application bounds the rest.

    Bytes: the parser gathers a header until it is whole, so both are counted: what became headers, and what arrived
    since the last whole head or piece of body (an endless header, an endless chunk extension).
    """

    def __init__(self, *args: Any, bounds: Config, **named: Any) -> None:
        super().__init__(*args, **named)
        self.timeout_keep_alive = cast("int", bounds.idle_ms / 1000)
        self._bounds = bounds
        self._limit: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._loose_bytes = 0
        self._refusal = 400

    # -- the connection ------------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        _send_at_once(transport)
        if len(self.connections) > self._bounds.connections_max:
            self._refuse(503)
        else:
            self._end_in(self._bounds.head_ms)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_limit()
        self._unset_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._loose_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.cycle.keep_alive = False  # nothing to upgrade to: answered as it is, and the parser reads no further
        except httptools.HttpParserError:
            self._refuse(self._refusal)
            return
        if self._loose_bytes > self._bounds.head_bytes_max:
            self._refuse(431)
        elif self._limit is None and not self._serving:  # the next head has begun, or a body that nobody waits for
            self._end_in(self._bounds.head_ms)

    def pause_writing(self) -> None:
        """The client reads too little. `send` waits from now on, and of small answers nobody else counts the time."""
        super().pause_writing()
        self._stall = self.loop.call_later(self._bounds.stall_ms / 1000, self.transport.abort)

    def resume_writing(self) -> None:
        self._unset_stall()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()  # not `close`, which waits for a client that may never read

    @property
    def _serving(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # -- from the parser; an exception makes it raise HttpParserError --------------------------------------------------
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._loose_bytes = 0
        self._unset_limit()
        if len(self.pipeline) >= self._bounds.pipelined_max:
            raise ValueError("too many requests ahead of their answers")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._loose_bytes = 0
        super().on_body(body)

    def _count_head(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > self._bounds.head_bytes_max:
            self._refusal = 431
            raise ValueError("too many header bytes")

    # -- the application -----------------------------------------------------------------------------------------------
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        super()._start_asgi_task(cycle, partial(self._answer, app))

    async def _answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        finally:
            self.loop.call_soon(self._linger)  # uvicorn decides first whether this connection goes on

    def _linger(self) -> None:
        if self.transport.is_closing():
            self._end_in(self._bounds.linger_ms)

    # -- endings -------------------------------------------------------------------------------------------------------
    def _refuse(self, status: int) -> None:
        """In the shape of every other error, unless that would land in the middle of an answer."""
        if not self._serving and not self.transport.is_closing():
            self.transport.write(REFUSALS[status])
        self.transport.close()
        self._end_in(self._bounds.linger_ms)

    def _end_in(self, delay_ms: int) -> None:
        self._unset_limit()
        self._limit = self.loop.call_later(delay_ms / 1000, self.transport.abort)

    def _unset_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _unset_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


def _send_at_once(transport: asyncio.Transport) -> None:
    """Each token when it is there. asyncio does so itself only where the listening socket names TCP as its protocol;
    without it a token waits for the acknowledgement of the one before, 40 ms on most systems."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _refusal(status: int, message: str, *headers: bytes) -> bytes:
    body = encode_json(error_value(status, message))
    length = b"content-length: %d" % len(body)
    lines = (b"content-type: application/json", length, b"connection: close", *headers, b"", body)
    return STATUS_LINE[status] + b"\r\n".join(lines)


REFUSALS: Final = {
    400: _refusal(400, "not an HTTP/1.1 request that is served here"),
    431: _refusal(431, "the request's headers are too long"),
    503: _refusal(503, "too many connections", b"retry-after: " + retry_after(limits.RETRY_AFTER_MS)),
}


# -- the process -------------------------------------------------------------------------------------------------------
def raise_open_files_limit(wanted: int = limits.OPEN_FILES_WANTED) -> int:
    """Raise the soft limit on open files as far as is wanted and allowed; the limit as it is now. Never lowers it.

    For the process to call once, before it listens: without a descriptor a connection is neither served nor refused.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= allowed:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
