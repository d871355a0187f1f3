"""A cluster to measure: real processes on loopback as `triptych serve` starts them, and what they wrote down."""

import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx

from control_plane.agent.process import TRACE_VARIABLE
from control_plane.options import EngineOptions, LogLevel
from control_plane.wire import inference_pb2 as pb
from control_plane.wire import inference_pb2_grpc as pb_grpc
from deploy.local import LocalCluster
from deploy.options import ServeOptions

REQUEST_TIMEOUT_S = 120.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def cluster(
    engine: EngineOptions, *, prefill: int = 1, decode: int = 1, encode: int = 0, trace: Path | None = None
) -> AsyncIterator[LocalCluster]:
    """So many workers of each kind, ready. With a `trace` folder, each writes `<name>.jsonl` there."""
    options = ServeOptions(
        engine=engine,
        prefill=prefill,
        decode=decode,
        encode=encode,
        port=0,
        admin_port=0,
        grpc_port=0,
        drain_timeout_s=5.0,
        log_level=LogLevel.WARNING,
    )
    variables = {TRACE_VARIABLE: str(trace)} if trace else {}
    running = LocalCluster(options, environments={spec.name: variables for spec in options.workers})
    await running.start(restart=False)
    try:
        await running.wait_ready()
        yield running
    finally:
        await running.stop()


def trace_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="triptych-bench-")


def read_trace(folder: Path, worker: str) -> list[dict[str, Any]]:
    """Events in order of time. Complete once the cluster has ended; a running worker is a heartbeat behind."""
    lines = (folder / f"{worker}.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda event: event["us"])


# -- clients -----------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def stub(running: LocalCluster) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.options.grpc_port}") as channel:
        yield pb_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Heard:
    """When a client had each token, on the clock of all processes."""

    sent_us: int
    tokens_us: tuple[int, ...]


async def generate(
    inference: Any, prompt: Sequence[int], max_tokens: int, on_decode: Callable[[], None] = lambda: None
) -> Heard:
    """Greedy, to the full length. `on_decode` is called with each token after the first."""
    sampling = pb.GenerateSampling(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=prompt), sampling=sampling)
    sent_us, tokens_us = now_us(), list[int]()
    async for response in inference.Generate(request, timeout=REQUEST_TIMEOUT_S):
        if tokens_us:
            on_decode()
        tokens_us += [now_us()] * len(response.token_ids)
    return Heard(sent_us, tuple(tokens_us))


async def addresses(running: LocalCluster) -> dict[str, str]:
    """Where each worker takes links, by name."""
    async with httpx.AsyncClient() as client:
        listed = (await client.get(f"{running.admin_url}/admin/v1/workers")).json()["workers"]
    return {worker["name"]: worker["address"] for worker in listed}


# -- clocks ------------------------------------------------------------------------------------------------------------
def now_us() -> int:
    return time.monotonic_ns() // 1_000


def cpu_s(pid: int) -> float:
    """User and system time of a process, all of its threads, those that have ended included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def engine_threads(pid: int) -> list[int]:
    """A worker's threads that compute: those that the kernel may only put where it may not put the worker's loop."""
    threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    return [thread for thread in threads if not os.sched_getaffinity(thread) & os.sched_getaffinity(pid)]


def engine_cores(pid: int) -> set[int]:
    return set().union(*map(os.sched_getaffinity, engine_threads(pid)))


def engine_waited_us(pid: int) -> int:
    """How long a worker's engine has been able to run, and its core was somebody else's."""
    stats = [Path(f"/proc/{pid}/task/{thread}/schedstat").read_text() for thread in engine_threads(pid)]
    return sum(int(stat.split()[1]) for stat in stats) // 1_000


def move(pid: int, cores: set[int]) -> None:
    """Let a process, all of its threads, run on these cores only."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)
