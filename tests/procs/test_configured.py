"""A cluster described by a file, a variable and a flag: what reaches which process, and that a key reaches only one."""

import asyncio
import os
import re
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trustme

READY_TIMEOUT_S = 30.0
END_TIMEOUT_S = 15.0
KEYS = ("sk-first", "sk-second")


@pytest.fixture
def authority(tmp_path: Path) -> ssl.SSLContext:
    """Writes a certificate and the file that names it; how a client trusts it."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    lines = [
        *("model: oracle", "executor: oracle", "kv-cache-mib: 16", "max-model-len: 256", "log-level: error"),
        *("port: 0", "admin_port: 0", "grpc_port: 0", f"ssl-certfile: {tmp_path / 'server.pem'}"),
        "served-model-name: from-the-file",
    ]
    (tmp_path / "triptych.yaml").write_text("\n".join(lines))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@asynccontextmanager
async def served(folder: Path, *flags: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    variables = {"TRIPTYCH_CONFIG": str(folder / "triptych.yaml"), "TRIPTYCH_API_KEY": ",".join(KEYS)}
    misleading = {"TRIPTYCH_LISTEN": "192.0.2.1:1", "TRIPTYCH_THREADS": "99"}  # a worker's, not this cluster's
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "triptych", "serve", *flags),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, **variables, **misleading},
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            yield process, await _announced_url(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _announced_url(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async for line in process.stdout:
        if found := re.search(r"ready after .*: (https://\S+)", line.decode()):
            return found[1]
    raise AssertionError("ended before it was ready")


def _told(parent: int) -> list[tuple[str, str]]:
    """Each child's command line, which everybody may see, and its environment, which only its user may."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [(_words(pid, "cmdline"), _words(pid, "environ")) for pid in children]


def _words(pid: str, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text().replace("\0", " ")


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_a_file_a_variable_and_a_flag_describe_a_cluster(tmp_path: Path, authority: ssl.SSLContext) -> None:
    async with served(tmp_path, "--mixed", "1", "--prefill", "0", "--decode", "0") as (process, url):
        told = _told(process.pid)
        async with httpx.AsyncClient(verify=authority, base_url=url) as client:
            refused = await client.get("/v1/models")
            listed = [await client.get("/v1/models", headers={"authorization": f"Bearer {key}"}) for key in KEYS]
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(END_TIMEOUT_S):
            assert await process.wait() == 0
    assert [refused.status_code, *(answer.status_code for answer in listed)] == [401, 200, 200]
    assert {answer.json()["data"][0]["id"] for answer in listed} == {"from-the-file"}
    assert sorted(line.split(" -m triptych ")[1].split()[0] for line, _ in told) == ["controller", "router", "worker"]
    assert not any(key in line for line, _ in told for key in KEYS)
    assert [" router " in line for line, environment in told if KEYS[0] in environment] == [True]
    assert not any("192.0.2.1" in environment or "TRIPTYCH_CONFIG" in environment for _, environment in told)
