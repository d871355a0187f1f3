"""Attack: image URLs that want the router to go somewhere (reliability D12, D13). For what is not allowed no name is
looked up and no packet is sent; what is allowed has a time, a size, one address and one request.

The trap is a server on loopback. Every connection of a fetcher goes through `Trapped`, which leads all addresses and
ports there, and counts. Names resolve to whatever a test says.
"""

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpcore
import pytest

from control_plane.router.media.fetch import Config, Fetcher, FetchFailed
from control_plane.router.media.reader import DENIED, FAILED
from control_plane.router.media.reasons import ImageRefused, Reason
from control_plane.router.media.remote_url import Denied, FetchDenied, check_address
from engine.base.errors import ResourceExhausted
from tests.control_plane.router.edge_fakes import turns
from tests.control_plane.router.seeing import asking, image_part, picture, saved, seeing

ALLOWED = "images.example.org"
PUBLIC = "93.184.215.14"
FILE = saved(picture())


class Trapped(httpcore.AsyncNetworkBackend):
    """Whoever is called for, the trap answers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._real = httpcore.AnyIOBackend()
        self.called: list[tuple[str, int]] = []

    async def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        self.called.append((host, port))
        return await self._real.connect_tcp("127.0.0.1", self._port)


class Trap:
    """`says` is what it answers; requests are kept as they came."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.accepted = 0
        self.names: list[str] = []  # that were looked up
        self.addresses: list[list[str]] = [[PUBLIC]]  # by look-up; the last one for all that follow
        self.says: Iterable[bytes] = answer(FILE)
        self.stalls = False
        self.backend: Trapped

    async def resolve(self, name: str, port: int) -> list[str]:
        self.names.append(name)
        return self.addresses[min(len(self.names), len(self.addresses)) - 1]

    def fetcher(self, *domains: str, check: Callable[[str], None] = check_address, **config: Any) -> Fetcher:
        return Fetcher(
            Config(domains=domains or (ALLOWED,), **config), resolve=self.resolve, check=check, backend=self.backend
        )

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            self.requests.append(await self._request(reader))
            for piece in self.says:
                writer.write(piece)
                await writer.drain()
            if self.stalls:
                await reader.read()  # until the other side hangs up
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()

    @staticmethod
    async def _request(reader: asyncio.StreamReader) -> bytes:
        """A head, or a client's first words in TLS, which this server does not speak."""
        first = await reader.readexactly(1)
        return first if first == b"\x16" else first + await reader.readuntil(b"\r\n\r\n")


@asynccontextmanager
async def trap() -> AsyncIterator[Trap]:
    made, tasks = Trap(), set[asyncio.Task[None]]()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(made.serve(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    made.backend = Trapped(server.sockets[0].getsockname()[1])
    try:
        yield made
    finally:
        server.close()
        await turns()  # whoever was accepted last has begun to be served: who never began would not hang up
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await turns()  # sockets close in one of the loop's next


def answer(body: bytes, *headers: bytes, status: bytes = b"200 OK", length: int | None = None) -> list[bytes]:
    head = [b"HTTP/1.1 " + status, b"content-length: %d" % (len(body) if length is None else length), *headers]
    return [b"\r\n".join(head) + b"\r\n\r\n", body]


# -- nobody goes there -------------------------------------------------------------------------------------------------
FORMS = (
    # schemes
    *("file:///etc/passwd", "file://images.example.org/a.png", "ftp://images.example.org/a.png", "gopher://a/_x"),
    *("javascript:alert(1)", "dict://127.0.0.1:11211/stat", "ldap://images.example.org", "unix:///var/run/docker.sock"),
    *("https+unix://%2Fvar%2Frun/a", "blob:http://images.example.org/a", "//images.example.org/a.png", "/etc/passwd"),
    *("images.example.org/a.png", "http:images.example.org/a.png", "http:/images.example.org/a.png", "hello", ""),
    *("http:///images.example.org/a.png", "http:////images.example.org", "http:\\\\images.example.org\\a.png"),
    # addresses in every spelling
    *("http://127.0.0.1/a.png", "http://localhost/a.png", "http://169.254.169.254/latest/meta-data/"),
    *(
        "http://10.0.0.1/",
        "http://172.16.0.1/",
        "http://192.168.0.1/",
        "http://0.0.0.0/",
        "http://0/",
        "http://100.64.0.1",
    ),
    *("http://2130706433/", "http://0x7f000001/", "http://0x7f.0x0.0x0.0x1/", "http://0177.0.0.1/", "http://127.1/"),
    *(
        "http://017700000001/",
        "http://127.0.0.1.nip.io/",
        "http://0x7f.1/",
        "http://1.1.1.1/",
        "http://256.256.256.256/",
    ),
    *(
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[fe80::1%25eth0]/",
    ),
    *("http://[64:ff9b::7f00:1]/", "http://[2002:7f00:1::]/", "http://[fd00:ec2::254]/", "http://[::127.0.0.1]/"),
    # a host that is not the host
    *("http://images.example.org@127.0.0.1/", "http://user:word@images.example.org/", "http://@images.example.org/"),
    *(
        "http://127.0.0.1#@images.example.org/",
        "http://127.0.0.1?@images.example.org/",
        "http://127.0.0.1\\@images.example.org/",
    ),
    *(
        "http://images.example.org\\@127.0.0.1/",
        "http://images.example.org\\.evil.org/",
        "http://images.example.org%00.evil.org/",
    ),
    *(
        "http://images.example.org%2eevil.org/",
        "http://images.example.org%40127.0.0.1/",
        "http://images.example.org:80@127.0.0.1/",
    ),
    *(
        "http://images.example.org.evil.org/",
        "http://evilimages.example.org/",
        "http://a.images.example.org/",
        "http://example.org/",
    ),
    *(
        "http://images.example.org./a.png",
        "http://.images.example.org/",
        "http://images..example.org/",
        "http://-images.example.org/",
    ),
    # characters that parsers drop, fold or split at
    *(
        "http://images.example\u3002org/",
        "http://images\uff0eexample.org/",
        "http://\u2139mages.example.org/",
        "http://ⅰmages.example.org/",
    ),
    *(
        "http://images.example.org\t/",
        "http://ima\tges.example.org/",
        "http://images.example.org\n/a",
        "\nhttp://images.example.org/",
    ),
    *(
        " http://images.example.org/",
        "http://images.example.org /",
        "http://images.example.org\r\nHost: evil/",
        "ht\ntp://images.example.org/",
    ),
    *(
        "http://images.example.org/a\r\nX: y",
        "http://images.example.org/\x00",
        "http://images.example.org/ü",
        "http://images.example.org/a b",
    ),
    *("http://images.example.org\u00ad/", "http://images.example.org\u200b/", "http://\u202eimages.example.org/"),
    # ports
    *(
        "http://images.example.org:22/",
        "http://images.example.org:443/",
        "https://images.example.org:80/",
        "http://images.example.org:/",
    ),
    *(
        "http://images.example.org:080x/",
        "http://images.example.org:+80/",
        "http://images.example.org:-80/",
        "http://images.example.org:99999/",
    ),
    *("http://images.example.org:8080:80/", "http://images.example.org:8o/", "http://images.example.org:６５/"),
    "http://images.example.org/" + "a" * 3_000,
)


def test_there_are_enough_of_them() -> None:
    assert len(set(FORMS)) == len(FORMS) >= 60


@pytest.mark.parametrize("url", FORMS, ids=ascii)
async def test_no_packet_is_sent(url: str) -> None:
    async with trap() as far:
        with pytest.raises(FetchDenied) as raised:
            await far.fetcher().fetch(url)
        assert raised.value.reason in (Denied.FORM, Denied.DOMAIN)
        assert (far.names, far.backend.called, far.accepted) == ([], [], 0)


async def test_it_is_off_unless_it_is_asked_for() -> None:
    async with trap() as far:
        fetcher = Fetcher(Config(), resolve=far.resolve, check=lambda _: None, backend=far.backend)
        for url in (*FORMS, f"https://{ALLOWED}/a.png"):
            with pytest.raises(FetchDenied) as raised:
                await fetcher.fetch(url)
            assert raised.value.reason is Denied.OFF
        assert (far.names, far.backend.called, far.accepted) == ([], [], 0)


INSIDE = (
    *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.31.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
    *("192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1"),
    *("255.255.255.255", "::", "::1", "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1"),
    *("::ffff:127.0.0.1", "::ffff:93.184.215.14", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::5db8:d70e"),
    *("64:ff9b:1::1", "2002:7f00:1::1", "2002:5db8:d70e::1", "2001::1", "2001:db8::1", "100::1", "localhost", ""),
    *("192.0.0.9", "192.88.99.1", "3fff::1"),
)


@pytest.mark.parametrize("address", INSIDE)
async def test_an_allowed_name_that_leads_inside_is_no_way_in(address: str) -> None:
    """Also where it has a public address beside it."""
    for addresses in ([address], [PUBLIC, address], [address, PUBLIC]):
        async with trap() as far:
            far.addresses = [addresses]
            with pytest.raises(FetchDenied) as raised:
                await far.fetcher().fetch(f"http://{ALLOWED}/a.png")
            assert raised.value.reason is Denied.ADDRESS
            assert (far.names, far.backend.called, far.accepted) == ([ALLOWED], [], 0)


@pytest.mark.parametrize("address", [PUBLIC, "1.1.1.1", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"])
def test_the_internet_is_allowed(address: str) -> None:
    check_address(address)


# -- somebody does -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("url", "target"),
    [
        (f"http://{ALLOWED}/a/b.png?x=1&y=%20z", "/a/b.png?x=1&y=%20z"),
        (f"http://{ALLOWED}", "/"),
        (f"HTTP://{ALLOWED.upper()}:80/A.png", "/A.png"),
        (f"http://{ALLOWED}?q", "/?q"),
        (f"http://{ALLOWED}/a@b:c/[1]~!$'()*+,;=", "/a@b:c/[1]~!$'()*+,;="),
        (f"http://{ALLOWED}/a.png#part@{ALLOWED}", "/a.png"),
    ],
)
async def test_an_allowed_image_comes_from_the_address_that_was_checked(url: str, target: str) -> None:
    async with trap() as far:
        assert b"".join(await far.fetcher().fetch(url)) == FILE
        assert (far.names, far.backend.called) == ([ALLOWED], [(PUBLIC, 80)])
        first, *headers = far.requests[0].decode().removesuffix("\r\n\r\n").split("\r\n")
        assert first == f"GET {target} HTTP/1.1"
        assert f"Host: {ALLOWED}" in headers and "Accept-Encoding: identity" in headers
        assert not [header for header in headers if header.lower().startswith(("cookie", "authorization"))]


async def test_a_name_is_looked_up_once_so_its_second_answer_does_not_count() -> None:
    """DNS rebinding: public for the check, loopback for the connection."""
    async with trap() as far:
        far.addresses = [[PUBLIC], ["127.0.0.1"]]
        await far.fetcher().fetch(f"http://{ALLOWED}/a.png")
        assert (len(far.names), far.backend.called) == (1, [(PUBLIC, 80)])
        with pytest.raises(FetchDenied):  # a second image is a second look-up, and a second check
            await far.fetcher().fetch(f"http://{ALLOWED}/a.png")
        assert far.accepted == 1


@pytest.mark.parametrize("to", [f"http://{ALLOWED}/b.png", "http://127.0.0.1/", "file:///etc/passwd"])
@pytest.mark.parametrize("status", [b"301 a", b"302 a", b"303 a", b"307 a", b"308 a"])
async def test_no_redirect_is_followed(status: bytes, to: str) -> None:
    async with trap() as far:
        far.says = answer(b"", b"location: " + to.encode(), status=status)
        with pytest.raises(FetchFailed):
            await far.fetcher().fetch(f"http://{ALLOWED}/a.png")
        assert far.accepted == 1


ENDLESS = [b"HTTP/1.1 200 OK\r\n\r\n", *([bytes(1 << 16)] * 64)]
FAILING: dict[str, Iterable[bytes]] = {
    "not found": answer(b"", status=b"404 Not Found"),
    "nothing to say": answer(b"", status=b"204 No Content"),
    "a part": answer(FILE, status=b"206 Partial Content"),
    "gzip": answer(gzip.compress(bytes(1 << 20)), b"content-encoding: gzip"),
    "br": answer(FILE, b"Content-Encoding: br"),
    "identity and gzip": answer(FILE, b"content-encoding: identity", b"content-encoding: gzip"),
    "fewer bytes than it says": answer(FILE, length=len(FILE) + 1),
    "no HTTP": [b"220 smtp.example.org ESMTP\r\n"],
    "nothing": [],
    "a negative length": answer(FILE, length=-1),
    "two lengths": answer(FILE, b"content-length: 7"),
    "endless headers": [b"HTTP/1.1 200 OK\r\n", *([b"x: " + b"y" * 4_000 + b"\r\n"] * 100)],
    "another protocol": answer(b"", b"upgrade: websocket", status=b"101 Switching Protocols"),
}


@pytest.mark.parametrize("name", FAILING)
async def test_what_is_no_answer_is_a_failure(name: str) -> None:
    async with trap() as far:
        far.says, fetcher = FAILING[name], far.fetcher()
        with pytest.raises(FetchFailed):
            await fetcher.fetch(f"http://{ALLOWED}/a.png")
        assert (far.accepted, fetcher.under_way) == (1, 0)


@pytest.mark.parametrize("says", [ENDLESS, answer(bytes(1 << 20)), answer(bytes(1 << 20), length=1 << 40)])
async def test_an_image_has_a_size_whatever_it_says(says: Iterable[bytes]) -> None:
    async with trap() as far:
        far.says, fetcher = says, far.fetcher(file_bytes_max=100_000)
        with pytest.raises(ImageRefused) as raised:
            await fetcher.fetch(f"http://{ALLOWED}/a.png")
        assert (raised.value.reason, fetcher.under_way) == (Reason.FILE_BYTES, 0)


@pytest.mark.parametrize("says", [[], answer(FILE)[:1], [b"HTTP/1.1 200 OK\r\n"], answer(FILE, length=1 << 20)])
async def test_a_server_that_takes_its_time_is_left(says: Iterable[bytes]) -> None:
    async with trap() as far:
        far.says, far.stalls, fetcher = says, True, far.fetcher(fetch_ms=50)
        with pytest.raises(FetchFailed):
            await fetcher.fetch(f"http://{ALLOWED}/a.png")
        assert fetcher.under_way == 0


async def test_a_resolver_that_does_not_answer_or_knows_nothing() -> None:
    async def silent(name: str, port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    async def unknown(name: str, port: int) -> list[str]:
        raise OSError("no such name")

    async def empty(name: str, port: int) -> list[str]:
        return []

    for resolve in (silent, unknown, empty):
        fetcher = Fetcher(Config(domains=(ALLOWED,), fetch_ms=50), resolve=resolve)
        with pytest.raises(FetchFailed):
            await fetcher.fetch(f"http://{ALLOWED}/a.png")
        assert fetcher.under_way == 0


async def test_a_server_without_tls_is_no_https_server() -> None:
    async with trap() as far:
        with pytest.raises(FetchFailed):
            await far.fetcher().fetch(f"https://{ALLOWED}/a.png")
        assert far.backend.called == [(PUBLIC, 443)]


async def test_so_many_at_a_time_and_each_place_comes_back() -> None:
    async with trap() as far:
        far.stalls, far.says, fetcher = True, [], far.fetcher(fetches_max=2, fetch_ms=60_000)
        running = [asyncio.create_task(fetcher.fetch(f"http://{ALLOWED}/{name}")) for name in "ab"]
        while fetcher.under_way < 2:  # noqa: ASYNC110 turns of the loop
            await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted):
            await fetcher.fetch(f"http://{ALLOWED}/c")
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert fetcher.under_way == 0


# -- through the whole edge --------------------------------------------------------------------------------------------
@pytest.mark.procs
async def test_clients_are_told_where_and_why_and_nothing_else() -> None:
    async with trap() as far:
        with seeing(fetcher=far.fetcher()) as router:
            where = "messages[0].content[1]"
            denied = await router.converse(messages=asking("?", image_part("http://169.254.169.254/secret")))
            assert (denied.status_code, denied.json()["error"]["message"]) == (403, f"{where}: {DENIED[Denied.FORM]}")
            assert router.sample("triptych_fetch_denied_total", reason="form") == 1
            far.says = answer(b"", status=b"500 secret")
            failed = await router.converse(messages=asking("?", image_part(f"http://{ALLOWED}/a.png")))
            assert (failed.status_code, failed.json()["error"]["message"]) == (400, f"{where}: {FAILED}")
            assert router.sample("triptych_fetch_failed_total") == 1
            assert router.core.delivered == []
            far.says = answer(FILE)
            served = await router.converse(messages=asking("?", image_part(f"http://{ALLOWED}/a.png")))
            assert served.status_code == 200
            assert router.core.submits[0].images[0].picture.pixels == picture().tobytes()


@pytest.mark.parametrize("url", [f"https://{ALLOWED}/a.png", "file:///etc/passwd", "hello"])
async def test_without_allowed_domains_every_url_but_a_data_url_is_denied(url: str) -> None:
    with seeing() as router:
        reply = await router.converse(messages=asking(image_part(url)))
        told = f"messages[0].content[0]: {DENIED[Denied.OFF]}"
        assert (reply.status_code, reply.json()["error"]["message"]) == (403, told)
