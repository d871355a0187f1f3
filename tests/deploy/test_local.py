"""The launcher's own decisions; whole clusters are in tests/procs."""

import asyncio
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme

from control_plane.lifecycle import STATUS_BUG
from control_plane.options import EdgeOptions, OptionError
from deploy import local
from deploy.local import KILL_AFTER_S, Child, LocalCluster
from deploy.options import ServeOptions

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


def any_ports(**given: int) -> ServeOptions:
    return ServeOptions(**{"port": 0, "admin_port": 0, "grpc_port": 0} | given)


async def run_python(code: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)


async def test_port_zero_becomes_a_port_that_everybody_is_told() -> None:
    cluster = LocalCluster(any_ports())
    ports = (cluster.options.port, cluster.options.admin_port, cluster.options.grpc_port)
    assert 0 not in ports
    assert len(set(ports)) == 3
    assert {str(port) for port in ports} <= set(cluster.router.arguments)
    assert await cluster.stop()


async def test_two_clusters_do_not_share_a_port() -> None:
    with local.addresses.listen("port", "127.0.0.1", 0) as other, pytest.raises(OptionError) as caught:
        LocalCluster(any_ports(grpc_port=local.addresses.port_of(other)))
    assert caught.value.option == "grpc-port"


async def test_a_child_that_had_to_be_killed_is_told_from_one_that_ended() -> None:
    child = Child("deaf", [], process=await run_python(DEAF))
    assert child.process is not None
    assert child.process.stdout is not None
    await child.process.stdout.readline()
    assert not await child.end(timeout_s=0.05)
    assert child.process.returncode == -signal.SIGKILL
    assert await child.end(timeout_s=0.05), "nothing to kill any more"


async def test_a_child_that_cannot_be_started_again_fails_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_more_processes(child: Child) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(Child, "start", no_more_processes)
    monkeypatch.setattr(local, "RESTART_PAUSE_S", 0.0)
    cluster = LocalCluster(any_ports())
    cluster.controller.process = await run_python("")
    await cluster._watch(cluster.controller, restart=True)
    assert cluster.failed.is_set()
    assert cluster.exit_status == STATUS_BUG
    assert await cluster.stop()


async def test_only_the_router_is_given_the_drain_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have nobody left to serve when it has gone: all of it ends within the drain and some seconds."""
    given_s: dict[str, float] = {}

    async def end(child: Child, timeout_s: float) -> bool:
        given_s[child.name] = timeout_s
        return True

    monkeypatch.setattr(Child, "end", end)
    assert await LocalCluster(replace(any_ports(), drain_timeout_s=20.0)).stop()
    assert given_s.pop("router") == 20.0 + KILL_AFTER_S
    assert set(given_s.values()) == {KILL_AFTER_S}


# -- TLS ---------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> EdgeOptions:
    """A certificate for a name that does not lead here, of an authority that nobody knows."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("models.example.org")
    for name, text in {
        "key": issued.private_key_pem,
        "chain": issued.cert_chain_pems[0],
        "ca": authority.cert_pem,
    }.items():
        text.write_to_path(str(folder / name))
    return EdgeOptions(ssl_certfile=folder / "chain", ssl_keyfile=folder / "key", ssl_ca_certs=folder / "ca")


@asynccontextmanager
async def ready_over_tls(edge: EdgeOptions) -> AsyncIterator[int]:
    """Answers 200 to whoever it lets in."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert edge.ssl_certfile is not None
    context.load_cert_chain(edge.ssl_certfile, edge.ssl_keyfile)
    if edge.ssl_ca_certs is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(edge.ssl_ca_certs)
    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("mutual", [False, True])
async def test_readiness_is_seen_through_tls(edge: EdgeOptions, mutual: bool) -> None:
    edge = edge if mutual else replace(edge, ssl_ca_certs=None)
    cluster = LocalCluster(replace(any_ports(), edge=edge))
    cluster.router.process = await run_python("import time; time.sleep(60)")
    async with ready_over_tls(edge) as port, local._probing(edge) as client:
        cluster.options = replace(cluster.options, port=port)
        assert cluster.url == f"https://127.0.0.1:{port}"
        assert await cluster._is_ready(client), cluster.unready
    assert await cluster.stop()


async def test_a_stranger_is_not_let_in_where_certificates_are_asked_for(edge: EdgeOptions) -> None:
    """What the test above would show if nobody checked."""
    cluster = LocalCluster(replace(any_ports(), edge=edge))
    async with ready_over_tls(edge) as port, local._probing(replace(edge, ssl_ca_certs=None)) as client:
        cluster.options = replace(cluster.options, port=port)
        assert not await cluster._is_ready(client)
        assert cluster.unready
    assert await cluster.stop()


# -- what is announced -------------------------------------------------------------------------------------------------
async def announced(options: ServeOptions, capsys: pytest.CaptureFixture[str], *, takes_chats: bool = True) -> str:
    cluster = LocalCluster(options)
    local._announce(cluster, 1.0, takes_chats=takes_chats)
    assert await cluster.stop()
    return capsys.readouterr().out


async def test_the_announcement_names_what_a_client_must_show(
    edge: EdgeOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, curl, chat in (
        (EdgeOptions(), "curl http://127.0.0.1:", ""),
        (EdgeOptions(api_keys=("sk-secret",)), 'curl -H "authorization: Bearer $TRIPTYCH_API_KEY" http://', ""),
        (replace(edge, ssl_ca_certs=None), "curl --cacert CA.pem https://127.0.0.1:", " --cacert CA.pem"),
        (edge, "curl --cacert CA.pem --cert CLIENT.pem https://", " --cacert CA.pem --cert CLIENT.pem"),
    ):
        printed = await announced(replace(any_ports(), edge=options), capsys)
        assert f"  {curl}" in printed
        assert re.search(rf"  triptych chat --url https?://127.0.0.1:\d+{chat}\n", printed)
        assert "sk-secret" not in printed


async def test_a_model_without_a_chat_template_is_not_announced_as_one_that_talks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = await announced(any_ports(), capsys, takes_chats=False)
    assert "/v1/completions" in printed
    assert "chat" not in printed


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")])
async def test_what_is_announced_is_an_address_that_can_be_dialled(
    host: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = await announced(replace(any_ports(), host=host), capsys)
    assert f"http://{shown}:" in printed
    assert "0.0.0.0" not in printed


async def test_opening_the_host_leaves_the_admin_port_at_home() -> None:
    cluster = LocalCluster(replace(any_ports(), host="0.0.0.0"))
    flags = list(pairwise(cluster.router.arguments))
    assert ("--host", "0.0.0.0") in flags
    assert ("--admin-host", "127.0.0.1") in flags
    assert await cluster.stop()


# -- chat templates ----------------------------------------------------------------------------------------------------
def test_a_wrong_chat_template_is_found_before_anything_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    options = EdgeOptions(chat_template=template)
    assert local._takes_chats(options, tmp_path)
    assert not local._takes_chats(EdgeOptions(), tmp_path), "the checkpoint has none of its own"
    template.write_text("{% for")
    with pytest.raises(OptionError, match=r"^the chat template is not a jinja template$") as caught:
        local._takes_chats(options, tmp_path)
    assert caught.value.option == "chat-template"
    monkeypatch.setattr(
        local, "choose_model", lambda *_, **__: SimpleNamespace(path=tmp_path, schema=None, vision=None)
    )
    for other in ("choose_profile", "configure_logging", "_serve"):
        monkeypatch.setattr(local, other, lambda *_, **__: None)
    with pytest.raises(OptionError, match="chat template"):
        local.serve(ServeOptions(edge=options))


def test_encode_workers_are_refused_for_a_model_that_takes_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "choose_model", lambda *_, **__: SimpleNamespace(path=None, schema=None, vision=None))
    monkeypatch.setattr(local, "configure_logging", lambda *_: None)
    with pytest.raises(OptionError) as caught:
        local.serve(any_ports(encode=1))
    assert caught.value.option == "encode"
