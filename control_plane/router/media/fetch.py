"""Going to get a remote image, for operators who allow it: one request, to an address that was checked.

    name -> resolve, once -> check every address -> connect to one of them -> GET, with the name in Host and in SNI

There is no second look-up between check and connection, so no answer of a name server can change in between. No
redirect is followed, no encoding undone, nothing is sent but the request, and all of it together has a time and a size.

What does not belong here: which URLs and addresses are allowed (`remote_url`), what is in the file (`decoding`).
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import httpcore

from control_plane.router.media.reasons import ImageRefused, Reason
from control_plane.router.media.remote_url import Denied, FetchDenied, RemoteUrl, allowed_url_untrusted, check_address
from control_plane.router.shares import Shares
from engine.base import limits
from engine.base.errors import ResourceExhausted

ACCEPTED: Final = b"image/png, image/jpeg, image/webp, image/gif"
HEADERS: Final = ((b"Accept", ACCEPTED), (b"Accept-Encoding", b"identity"), (b"User-Agent", b"triptych"))
ADDRESSES_MAX: Final = 4  # tried, of those that a name has
PIECE_BYTES: Final = 64 << 10  # at least, of what is handed on, but for the last

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""All addresses of a name, as text."""

CheckAddress = Callable[[str], None]
"""Raises `FetchDenied`."""


class FetchFailed(Exception):
    """Nothing usable came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    domains: tuple[str, ...] = ()  # none: nothing remote is fetched
    fetch_ms: int = limits.MEDIA_FETCH_MS
    file_bytes_max: int = limits.IMAGE_FILE_BYTES_MAX
    fetches_max: int = limits.MEDIA_DECODES_WAITING_MAX  # at a time: each is an image to decode
    tenants: int = 1


class Fetcher:
    """Gets images, some at a time; of the places a tenant has a share."""

    def __init__(
        self,
        config: Config | None = None,
        *,
        resolve: Resolve | None = None,
        check: CheckAddress = check_address,
        backend: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        """`backend` connects to addresses: tests have their own, and a `check` that knows their server's."""
        self._config = config or Config()
        self._places = Shares(self._config.fetches_max, tenants=self._config.tenants)
        self._resolve = resolve or resolved
        self._check = check
        self._backend = backend or httpcore.AnyIOBackend()
        self._tls: ssl.SSLContext | None = None

    @property
    def under_way(self) -> int:
        return self._places.total

    async def fetch(self, url: str, *, tenant: str = "") -> list[bytes]:
        """The file, in pieces. Raises `FetchDenied`, `FetchFailed`, `ImageRefused`, or what no free place says."""
        if not self._config.domains:
            raise FetchDenied(Denied.OFF)
        remote = allowed_url_untrusted(url, self._config.domains)
        with self._place(tenant):
            try:
                async with asyncio.timeout(self._config.fetch_ms / 1_000):
                    return await self._get(remote)
            except (TimeoutError, OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
                raise FetchFailed from None

    async def _get(self, remote: RemoteUrl) -> list[bytes]:
        url = httpcore.URL(scheme=remote.scheme, host=remote.host, port=remote.port, target=remote.target)
        async with (
            self._connections() as connections,
            connections.stream("GET", url, headers=_headers(remote)) as answer,
        ):
            _check_head(answer)
            return await self._body(answer.aiter_stream())

    async def _body(self, pieces: AsyncIterator[bytes]) -> list[bytes]:
        """Counted by what comes: a length is a claim. Crumbs are swept together, and others have their turn meanwhile:
        what is buffered already comes without waiting, however small its chunks are."""
        file: list[bytes] = []
        crumbs = bytearray()
        size_bytes = 0
        async for piece in pieces:
            size_bytes += len(piece)
            if size_bytes > self._config.file_bytes_max:
                raise ImageRefused(Reason.FILE_BYTES)
            crumbs += piece
            if len(crumbs) >= PIECE_BYTES:
                file.append(bytes(crumbs))
                crumbs.clear()
            await asyncio.sleep(0)
        return [*file, bytes(crumbs)]

    @asynccontextmanager
    async def _connections(self) -> AsyncIterator[httpcore.AsyncConnectionPool]:
        """One for each fetch, and closed with it: nothing stays open to a place that was checked some time ago."""
        self._tls = self._tls or ssl.create_default_context()
        backend = CheckedBackend(self._resolve, self._check, self._backend)
        try:
            async with httpcore.AsyncConnectionPool(
                ssl_context=self._tls, max_connections=1, network_backend=backend
            ) as connections:
                yield connections
        finally:
            await backend.hang_up()

    def _place(self, tenant: str) -> "_Place":
        if not (self._places.fits(1) and self._places.allows(tenant, 1)):
            raise ResourceExhausted("too many remote images at once", retry_after_ms=limits.RETRY_AFTER_MS)
        return _Place(self._places, tenant)


class _Place:
    def __init__(self, places: Shares, tenant: str) -> None:
        self._places = places
        self._tenant = tenant

    def __enter__(self) -> None:
        self._places.take(self._tenant, 1)

    def __exit__(self, *_: object) -> None:
        self._places.give(self._tenant, 1)


# -- connecting --------------------------------------------------------------------------------------------------------
class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects by name to an address that was checked; TLS is told the name by httpcore, whichever address it was.

    One for each fetch: it hangs up itself, for httpcore forgets a connection that is given up in its handshake.
    """

    def __init__(self, resolve: Resolve, check: CheckAddress, backend: httpcore.AsyncNetworkBackend) -> None:
        self._resolve = resolve
        self._check = check
        self._backend = backend
        self._streams: list[httpcore.AsyncNetworkStream] = []

    async def hang_up(self) -> None:
        """Idempotent, as closing a stream is."""
        for stream in self._streams:
            await stream.aclose()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 the library's signature; ours is around all of it
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._resolve(host, port)
        for address in addresses:  # every one: a name that also leads inside is no name of the internet
            self._check(address)
        for address in addresses[:ADDRESSES_MAX]:
            try:
                self._streams.append(await self._backend.connect_tcp(address, port))
                return self._streams[-1]
            except httpcore.NetworkError:
                continue
        raise httpcore.ConnectError

    async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError

    async def sleep(self, seconds: float) -> None:
        """For retries, of which there are none."""
        raise httpcore.ConnectError


async def resolved(host: str, port: int) -> list[str]:
    """Asks the system."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


# -- messages ----------------------------------------------------------------------------------------------------------
def _headers(remote: RemoteUrl) -> list[tuple[bytes, bytes]]:
    return [(b"Host", remote.host.encode()), *HEADERS]


def _check_head(answer: httpcore.Response) -> None:
    encodings = {value.strip().lower() for name, value in answer.headers if name.lower() == b"content-encoding"}
    if answer.status != 200 or encodings - {b"identity"}:
        raise FetchFailed
