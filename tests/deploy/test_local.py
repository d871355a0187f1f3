"""The launcher's own decisions; whole clusters are in tests/procs."""

import asyncio
import signal
import sys

import pytest

from control_plane.lifecycle import STATUS_BUG
from control_plane.options import OptionError
from deploy import local
from deploy.local import Child, LocalCluster
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
