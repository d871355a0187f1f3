"""Processes start, end and start again as a person or a supervisor asks them to (reliability A1, A2, C12; promise I1).

What a client is told while its router goes, that nobody is left behind, and that a mistake is one line and status 2.
"""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from control_plane import addresses
from control_plane.lifecycle import REPEAT_WITHIN_S, STATUS_AT_ONCE, STATUS_BUG, STATUS_MISTAKE
from control_plane.options import LogLevel, RouterOptions
from control_plane.router import server
from control_plane.router.core import RouterCore
from control_plane.router.requests import Submit
from deploy.local import KILL_AFTER_S, LocalCluster
from deploy.options import ServeOptions
from tests.procs.harness import (
    ORACLE,
    PACED_ORACLE,
    Answer,
    Prompt,
    ask,
    ask_all,
    cluster,
    oracle_prompt,
    until,
    verdict,
)

PACED = ("--model", "oracle", "--executor", "paced", "--kv-cache-mib", "64", "--max-model-len", "1024")
ANY_PORTS = ("--port", "0", "--admin-port", "0", "--grpc-port", "0")
SHUT_DOWN = "error 200 ServiceUnavailableError"  # after the first token: told inside the stream
READY_TIMEOUT_S = 30.0
END_TIMEOUT_S = 15.0
AT_ONCE_S = 4.0  # a busy machine's idea of it; far below any drain time-out here


# -- what the tests start and look at ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Served:
    """A `triptych serve` that has announced itself."""

    process: asyncio.subprocess.Process
    url: str

    @property
    def children(self) -> set[int]:
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return {int(pid) for pid in listed.split()}

    async def end(self, timeout_s: float = END_TIMEOUT_S) -> int:
        async with asyncio.timeout(timeout_s):
            return await self.process.wait()


async def start_command(*arguments: str) -> asyncio.subprocess.Process:
    """In a session of its own, with its output to read."""
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "triptych", *arguments)
    return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe, start_new_session=True)


@asynccontextmanager
async def served(*, drain_timeout_s: float = 10.0) -> AsyncIterator[Served]:
    flags = (*PACED, *ANY_PORTS, "--drain-timeout-s", str(drain_timeout_s), "--log-level", "error")
    process = await start_command("serve", *flags)
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            yield Served(process, await announced_url(process))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def announced_url(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async for line in process.stdout:
        if found := re.search(r"ready after .*: (http://\S+)", line.decode()):
            return found[1]
    raise AssertionError("ended before it was ready")


async def run_command(*arguments: str) -> tuple[int, str]:
    """A command that is to end by itself; its status and standard error."""
    process = await start_command(*arguments)
    async with asyncio.timeout(END_TIMEOUT_S):
        _, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, errors.decode()


@asynccontextmanager
async def streaming(url: str, prompt: Prompt) -> AsyncIterator[asyncio.Task[Answer]]:
    """A request that is being answered: its first token has arrived."""
    begun = asyncio.Event()
    async with httpx.AsyncClient(event_hooks={"response": [lambda response: note(begun)]}) as client:
        answer = asyncio.create_task(ask(client, url, prompt))
        await begun.wait()
        try:
            yield answer
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)


async def note(event: asyncio.Event) -> None:
    event.set()


async def all_gone(pids: set[int], timeout_s: float) -> None:
    """Ended, and reaped or not."""

    def left() -> set[int]:
        return {pid for pid in pids if state(pid) not in "ZX"}

    async def gone() -> bool:
        return not left()

    await until(gone, lambda: f"still there: {left()}", timeout_s)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def long_prompt(tokens: int) -> Prompt:
    """At the paced executor's 36 ms a token."""
    return oracle_prompt(1, max_tokens=(tokens, tokens), config=PACED_ORACLE)


# -- asked to end ------------------------------------------------------------------------------------------------------
@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_a_running_stream_may_finish() -> None:
    prompt = long_prompt(40)
    async with served() as running, streaming(running.url, prompt) as answer:
        children = running.children
        running.process.terminate()
        assert verdict(prompt, await answer) == "right"
        assert await running.end() == 0
        assert {pid for pid in children if state(pid) not in "ZX"} == set()


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_a_stream_longer_than_the_drain_is_told_so() -> None:
    prompt = long_prompt(400)
    async with served(drain_timeout_s=1.0) as running, streaming(running.url, prompt) as answer:
        running.process.terminate()
        assert verdict(prompt, await answer) == SHUT_DOWN
        assert await running.end(1.0 + KILL_AFTER_S) == 0


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_one_request_to_end_may_reach_everybody_twice() -> None:
    """A supervisor signals every process of a service, and the launcher passes it on."""
    prompt = long_prompt(40)
    async with served() as running, streaming(running.url, prompt) as answer:
        for pid in (running.process.pid, *running.children, running.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert verdict(prompt, await answer) == "right"
        assert await running.end() == 0


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_a_second_request_to_end_means_now_for_all() -> None:
    async with served() as running, streaming(running.url, long_prompt(400)):
        children = running.children
        running.process.send_signal(signal.SIGINT)
        await asyncio.sleep(1.2 * REPEAT_WITHIN_S)  # the first one's echoes are over
        running.process.send_signal(signal.SIGINT)
        assert await running.end(AT_ONCE_S) == STATUS_AT_ONCE
        await all_gone(children, AT_ONCE_S)


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_nobody_outlives_a_launcher_that_was_killed() -> None:
    prompt = long_prompt(40)
    async with served() as running, streaming(running.url, prompt) as answer:
        children = running.children
        assert len(children) == 4
        running.process.kill()
        assert verdict(prompt, await answer) == "right"  # they end as if they had been asked to
        await all_gone(children, END_TIMEOUT_S)


# -- mistakes ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def taken_port() -> Iterator[str]:
    with addresses.listen("port", "127.0.0.1", 0) as listening:
        yield str(addresses.port_of(listening))


Taken = Callable[[str], list[str]]
TAKEN: dict[str, Taken] = {
    "serve --port": lambda port: ["serve", *PACED, *ANY_PORTS, "--port", port],
    "serve --admin-port": lambda port: ["serve", *PACED, *ANY_PORTS, "--admin-port", port],
    "serve --grpc-port": lambda port: ["serve", *PACED, *ANY_PORTS, "--grpc-port", port],
    "router --port": lambda port: ["router", "--controller", "127.0.0.1:1", *PACED, *ANY_PORTS, "--port", port],
    "router --grpc-port": lambda port: [
        "router",
        "--controller",
        "127.0.0.1:1",
        *PACED,
        *ANY_PORTS,
        "--grpc-port",
        port,
    ],
    "controller --listen": lambda port: ["controller", "--listen", f"127.0.0.1:{port}"],
}


@pytest.mark.procs
@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", TAKEN)
async def test_a_taken_port_is_one_line(what: str, taken_port: str) -> None:
    status, errors = await run_command(*TAKEN[what](taken_port))
    (line,) = errors.splitlines()
    assert status == STATUS_MISTAKE
    assert line == f"triptych: {what.split()[1]}: cannot listen on 127.0.0.1:{taken_port}: Address already in use"


@pytest.mark.procs
@pytest.mark.timeout(30)
@pytest.mark.parametrize("command", ["serve", "router --controller 127.0.0.1:1", "worker --name w --role decode"])
async def test_a_wrong_model_is_one_line(command: str, tmp_path: Path) -> None:
    controller = ["--controller", "127.0.0.1:1"] if command.startswith("worker") else []
    ports = [] if command.startswith("worker") else ANY_PORTS
    for folder, reason in ((tmp_path / "none", "neither a directory"), (tmp_path, "cannot read")):
        status, errors = await run_command(*command.split(), *controller, *ports, "--model", str(folder))
        (line,) = errors.splitlines()
        assert status == STATUS_MISTAKE
        assert line.startswith("triptych: --model: ")
        assert reason in line


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_a_router_that_cannot_run_like_this_is_not_started_again() -> None:
    """Whoever takes the port between the launcher's look and the router's."""
    running = LocalCluster(ServeOptions(engine=ORACLE, port=0, admin_port=0, grpc_port=0, log_level=LogLevel.ERROR))
    try:
        with addresses.listen("port", "127.0.0.1", running.options.port):
            await running.start()
            with pytest.raises(RuntimeError):
                await running.wait_ready(READY_TIMEOUT_S)
        assert running.exit_status == STATUS_MISTAKE
        assert len(running.router.started_s) == 1
    finally:
        assert await running.stop()


# -- started again -----------------------------------------------------------------------------------------------------
@pytest.mark.procs
@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGABRT])
async def test_a_lost_router_is_started_again_and_serves(how: signal.Signals) -> None:
    prompts = [oracle_prompt(seed) for seed in range(16)]
    async with cluster(restart=True) as running:
        old = running.router.process
        assert old is not None
        old.send_signal(how)
        await old.wait()
        await running.wait_ready(READY_TIMEOUT_S)
        answers = await ask_all(running, prompts)
        assert Counter(map(verdict, prompts, answers)) == {"right": len(prompts)}
        assert running.router.process is not old


@pytest.mark.procs
@pytest.mark.timeout(60)
async def test_a_lost_controller_is_not_missed() -> None:
    """Requests need it only to learn who is there (reliability A1)."""
    prompts = [oracle_prompt(seed) for seed in range(300)]
    async with cluster(restart=True) as running:
        old_pid = running.controller.pid
        asked = asyncio.create_task(ask_all(running, prompts))
        os.kill(old_pid, signal.SIGKILL)

        async def back() -> bool:
            return running.controller.pid != old_pid

        await until(back, lambda: "the controller is not there again")
        answers = await asked
        later = await ask_all(running, prompts[:16])
        assert Counter(map(verdict, prompts, answers)) == {"right": len(prompts)}
        assert Counter(map(verdict, prompts[:16], later)) == {"right": 16}


@pytest.mark.procs
@pytest.mark.timeout(30)
async def test_a_crashed_machine_ends_its_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, because no flag plants a bug: the client is told, and the status tells the launcher."""
    step = RouterCore.step

    def planted(core: RouterCore, event: object, now_us: int) -> Any:
        actions = step(core, event, now_us)
        if isinstance(event, Submit):  # accepted, and never to be ended
            raise RuntimeError("planted")
        return actions

    monkeypatch.setattr(RouterCore, "step", planted)
    options = RouterOptions(controller="127.0.0.1:1", engine=ORACLE, port=0, admin_port=0, grpc_port=0)
    with contextlib.ExitStack() as stack:
        listening = server._Listening.at(options, stack)
        url = f"http://{addresses.authority_of(listening.public)}"
        router = asyncio.create_task(server._serve(options, server._Served.of(options), listening))
        async with httpx.AsyncClient() as client:
            answer = await ask(client, url, oracle_prompt(1))
        assert answer.status == 503
        async with asyncio.timeout(AT_ONCE_S):
            assert await router == STATUS_BUG
