"""TLS on HTTP and gRPC: who has the authority's certificate gets through, nobody else does, and mistakes say what."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme

from control_plane.options import EdgeOptions, OptionError
from control_plane.router.access.tls import Tls
from control_plane.router.http.server import HttpServer

HOST = "127.0.0.1"


class Files:
    """A certificate of an authority of the test's own, in files."""

    def __init__(self, folder: Path) -> None:
        self.authority = trustme.CA()
        self.certificate, self.key, self.roots = folder / "cert.pem", folder / "key.pem", folder / "roots.pem"
        issued = self.authority.issue_cert(HOST)
        issued.cert_chain_pems[0].write_to_path(str(self.certificate))
        issued.private_key_pem.write_to_path(str(self.key))
        self.authority.cert_pem.write_to_path(str(self.roots))

    def tls(self, **more: Path) -> Tls:
        tls = Tls.of(EdgeOptions(ssl_certfile=self.certificate, ssl_keyfile=self.key, **more))
        assert tls is not None
        return tls

    def client(self, *, shows_certificate: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if shows_certificate:
            self.authority.issue_cert("client.example").configure_cert(context)
        return context


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["scheme"].encode()})


@asynccontextmanager
async def serving(tls: Tls) -> AsyncIterator[int]:
    listening = socket.create_server((HOST, 0))
    server = HttpServer(app, listening, tls=tls.context())
    task = asyncio.create_task(server.serve())
    try:
        yield int(listening.getsockname()[1])
    finally:
        server.stop(force=True)
        await asyncio.gather(task, return_exceptions=True)


async def get(url: str, verify: ssl.SSLContext | bool = True) -> str:
    async with httpx.AsyncClient(verify=verify, trust_env=False) as client:
        return (await client.get(url)).text


async def test_https_for_who_trusts_the_authority_only(files: Files) -> None:
    async with serving(files.tls()) as port:
        assert await get(f"https://{HOST}:{port}/", files.client()) == "https"
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            await get(f"https://{HOST}:{port}/")
        with pytest.raises(httpx.TransportError):
            await get(f"http://{HOST}:{port}/")


async def test_clients_show_a_certificate_where_that_is_asked_for(files: Files) -> None:
    async with serving(files.tls(ssl_ca_certs=files.roots)) as port:
        url = f"https://{HOST}:{port}/"
        assert await get(url, files.client(shows_certificate=True)) == "https"
        with pytest.raises(httpx.TransportError):
            await get(url, files.client())


@pytest.mark.parametrize("shows_certificate", [True, False])
async def test_grpc_alike(files: Files, shows_certificate: bool) -> None:
    server = grpc.aio.server()
    port = server.add_secure_port(f"{HOST}:0", files.tls(ssl_ca_certs=files.roots).credentials())
    await server.start()
    own = files.authority.issue_cert("client.example")
    pair = {"private_key": own.private_key_pem.bytes(), "certificate_chain": own.cert_chain_pems[0].bytes()}
    credentials = grpc.ssl_channel_credentials(files.roots.read_bytes(), **(pair if shows_certificate else {}))
    async with grpc.aio.secure_channel(f"{HOST}:{port}", credentials) as channel:
        call = channel.unary_unary("/nobody/knows")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=5)
    await server.stop(None)
    through = grpc.StatusCode.UNIMPLEMENTED  # the handshake was passed: there is nothing behind it
    assert (caught.value.code() is through) is shows_certificate


def test_mistakes_name_the_flag(files: Files, tmp_path: Path) -> None:
    (tmp_path / "junk").write_text("no certificate")
    junk = tmp_path / "junk"
    for options, flag in (
        ({"ssl_certfile": junk}, "ssl-certfile"),
        ({"ssl_certfile": files.certificate, "ssl_keyfile": junk}, "ssl-certfile"),
        ({"ssl_certfile": files.certificate}, "ssl-certfile"),  # without its key
        ({"ssl_certfile": files.certificate, "ssl_keyfile": files.key, "ssl_ca_certs": junk}, "ssl-ca-certs"),
        ({"ssl_keyfile": files.key}, "ssl-certfile"),
        ({"ssl_certfile": tmp_path / "nowhere"}, "ssl-certfile"),
    ):
        with pytest.raises(OptionError) as caught:
            Tls.of(EdgeOptions(**options))
        assert caught.value.option == flag


def test_without_files_there_is_no_tls() -> None:
    assert Tls.of(EdgeOptions()) is None
