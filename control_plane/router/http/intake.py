"""Taking a request's body in: bounded in bytes, in time, and in what all bodies and those of one tenant hold; over when
the client leaves.

What does not belong here: what the bytes mean (`validation`), and answers (`generation`, `json_calls`).
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self, TypeVar

from starlette.types import Receive

from control_plane.router.access.tenants import Tenant
from control_plane.router.http.responses import BodyTooSlow
from control_plane.router.validation.body import BodyMemory, HeldBody
from control_plane.router.validation.cutouts import Body

T = TypeVar("T")


class ClientGone(Exception):
    """The client left before its request was one: nobody is there to answer."""


class Departure:
    """Watches, once the body is whole, for the client to leave, and then does the one thing that stops its work.

    The task that watches is gone when the `async with` block is left.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False
        self._stop: Callable[[], None] = _nothing
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def watch(self) -> None:
        self._task = asyncio.create_task(self._until_disconnect())

    def then(self, stop: Callable[[], None]) -> None:
        """From now on `stop` is what ends the work; called at once if the client has left already."""
        self._stop = stop
        if self._gone:
            stop()

    @asynccontextmanager
    async def interrupts(self) -> AsyncIterator[None]:
        """`ClientGone` inside the block, at whatever it waits for."""
        try:
            async with asyncio.timeout(None) as limit:
                self.then(lambda: None if limit.expired() else limit.reschedule(0.0))
                try:
                    yield
                finally:
                    self._stop = _nothing
        except TimeoutError:
            raise ClientGone from None

    async def _until_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._stop()


def _nothing() -> None:
    pass


class Intake:
    """Reads the bodies of one port's requests."""

    def __init__(
        self, memory: BodyMemory, body_bytes_max: int, body_read_ms: int, *, json_bytes_max: int | None = None
    ) -> None:
        """`json_bytes_max`: of what is no image, in bodies that may hold images."""
        self._memory = memory
        self._body_bytes_max = body_bytes_max
        self._body_read_ms = body_read_ms
        self._json_bytes_max = json_bytes_max

    async def take(
        self, receive: Receive, departure: Departure, tenant: Tenant, work: Callable[[Body], Awaitable[T]]
    ) -> T:
        """What `work` makes of the whole body. Raises `ClientGone`, also while it works."""
        with self._memory.hold(self._body_bytes_max, tenant.name, json_bytes_max=self._json_bytes_max) as body:
            await self._read(receive, body)
            departure.watch()
            async with departure.interrupts():
                return await work(body.whole())

    async def _read(self, receive: Receive, body: HeldBody) -> None:
        try:
            async with asyncio.timeout(self._body_read_ms / 1000):
                await read_body(receive, body)
        except TimeoutError:
            raise BodyTooSlow(f"body: must arrive within {self._body_read_ms} ms", field="body") from None


async def read_body(receive: Receive, body: HeldBody) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body.append(message.get("body", b""))
        if not message.get("more_body", False):
            return
