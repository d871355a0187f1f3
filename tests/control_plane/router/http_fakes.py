"""A real server on loopback and a client that writes bytes as it likes: what the tests of connections share."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from control_plane.router.http.server import Config, HttpServer


class Client:
    """One connection, spoken by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one answer that has a length."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return int(status.split(" ")[1]), headers, body

    async def rest(self) -> bytes:
        """What still comes until the server hangs up, politely or not. Waits for that."""
        received = b""
        try:
            while part := await self.reader.read(1 << 16):
                received += part
        except ConnectionError:
            pass
        return received


class Served:
    def __init__(self, server: HttpServer, task: asyncio.Task[None], port: int) -> None:
        self.server = server
        self.task = task
        self.port = port
        self._clients: list[Client] = []

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self._clients.append(client)
        return client

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():  # noqa: ASYNC110 what is waited for happens in the kernel and in other connections
            await asyncio.sleep(0)

    async def close(self) -> None:
        self.server.stop(force=True)
        await asyncio.gather(self.task, return_exceptions=True)
        for client in self._clients:
            client.writer.transport.abort()
            await asyncio.gather(client.writer.wait_closed(), return_exceptions=True)


@asynccontextmanager
async def serving(app: Any, **bounds: int) -> AsyncIterator[Served]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = HttpServer(app, listening, Config(**bounds))
    served = Served(server, asyncio.create_task(server.serve()), listening.getsockname()[1])
    try:
        yield served
    finally:
        await served.close()


class Hello:
    """Says hello, when it may, and remembers how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        await self.may_answer.wait()
        headers = [(b"content-length", b"5")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"hello"})


GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
POST_CHUNKED = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
