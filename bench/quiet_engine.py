"""Does a decode step notice that frames arrive beside it? 8 decoding streams, flooded and left alone in turn.

    windows    off | on | off | on | ...     a pair is an "on" and the "off" before it
    ratio      median step time on / off, per pair; the figure is the median pair

One engine computes (the prefill worker is idle); the sender and the worker's event loop, codec thread and gRPC threads
share the other core. Steps are timed where they end, on the engine's thread, by its trace.

A step's time is what the engine computes and what it waits for in its process: the interpreter's lock, above all. It is
not what it waits for its core: none of the worker's other threads may run there, so that is other programs, which have
nowhere else to go while frames keep the other core busy. `wall` in the notes has it all. And what frames cost an engine
grows with their number, so a pair in which they came slower than they should counts as if they had not.
"""

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.cluster import (
    addresses,
    cluster,
    engine_cores,
    engine_waited_us,
    generate,
    move,
    now_us,
    read_trace,
    stub,
    trace_folder,
)
from bench.figures import Bar, Figure, figure_of, save
from bench.flood import BYTES_PER_S
from bench.overlap import ENGINE, VOCABULARY

STREAMS = 8
PROMPT_TOKENS = 128
OUTPUT_TOKENS = 800  # more than the windows need; the clients leave
PAIRS = 16
WINDOW_S = 1.0
START_TIMEOUT_S = 60.0
SETTLE_US = 50_000  # at the start of a window, while the last one fades
RATE_FLOOR = 0.7  # of the rate that is claimed: on two cores the sender shares one with all of the receiver's I/O

QUIET_ENGINE = Bar(
    name="quiet engine",
    claim=f"decode step of {STREAMS} streams beside frames at up to {BYTES_PER_S / 1e6:.0f} MB/s, and alone",
    unit="x",
    limit=1.3,
)


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of time with or without frames."""

    start_us: int
    end_us: int
    waited_us: int  # the engine, for its core
    bytes_per_s: float

    def steps_us(self, ends_us: Sequence[int]) -> list[int]:
        """Durations of the steps that lie inside."""
        inside = [at_us for at_us in ends_us if self.start_us + SETTLE_US <= at_us <= self.end_us]
        return [end - start for start, end in pairwise(inside)]

    @property
    def core_share(self) -> float:
        """How much of the time the engine's core was the engine's."""
        return 1 - self.waited_us / (self.end_us - self.start_us)


class Flood:
    """The sender's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def on(self) -> None:
        await self._tell("on")

    async def off(self) -> float:
        """Bytes per second that were acknowledged since `on`."""
        await self._tell("off")
        report = json.loads(await self._hear())
        return float(report["bytes"] / report["seconds"])

    async def ready(self) -> None:
        if await self._hear() != "ready":
            raise RuntimeError("the sender did not start")

    async def _tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n".encode())
        await self._process.stdin.drain()

    async def _hear(self) -> str:
        assert self._process.stdout is not None
        return (await self._process.stdout.readline()).decode().strip()


@asynccontextmanager
async def flood(address: str) -> AsyncIterator[Flood]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.flood", address), stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[1]
    )
    try:
        sender = Flood(process)
        await sender.ready()
        yield sender
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def measure(pairs: int = PAIRS) -> list[Figure]:
    with trace_folder() as folder:
        async with cluster(ENGINE, trace=Path(folder)) as running:
            prefill_cores, decode = engine_cores(running.child("prefill-0").pid), running.child("decode-0").pid
            async with stub(running) as inference, flood((await addresses(running))["decode-0"]) as sender:
                move(sender.pid, prefill_cores)  # its engine is idle; the sender is no part of what is measured
                streams = await _start_streams(inference)
                windows = [await _window(sender, decode, on=bool(index % 2)) for index in range(2 * pairs)]
                for stream in streams:
                    stream.cancel()
                await asyncio.gather(*streams, return_exceptions=True)
        steps = read_trace(Path(folder), "decode-0")
    return [_figure(windows, steps)]


async def _start_streams(inference: Any) -> list[asyncio.Task[Any]]:
    """Returns when all of them decode."""
    draw = random.Random(2)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(STREAMS)]
    await asyncio.gather(*(generate(inference, prompt, 2) for prompt in prompts))  # links, threads, memory: all there
    decoding = [asyncio.Event() for _ in prompts]
    streams = [
        asyncio.create_task(generate(inference, prompt, OUTPUT_TOKENS, event.set))
        for prompt, event in zip(prompts, decoding, strict=True)
    ]
    async with asyncio.timeout(START_TIMEOUT_S):
        await asyncio.gather(*(event.wait() for event in decoding))
    return streams


async def _window(sender: Flood, decode: int, *, on: bool) -> Window:
    start_us, waited_us = now_us(), engine_waited_us(decode)
    if on:
        await sender.on()
    await asyncio.sleep(WINDOW_S)
    end_us, waited_us = now_us(), engine_waited_us(decode) - waited_us
    return Window(start_us, end_us, waited_us, await sender.off() if on else 0.0)


def _figure(windows: Sequence[Window], events: Sequence[dict[str, Any]]) -> Figure:
    full = [event["us"] for event in events if event["event"] == "tokens" and len(event["seqs"]) == STREAMS]
    wall_us = [median(window.steps_us(full)) for window in windows]
    own_us = [step_us * window.core_share for step_us, window in zip(wall_us, windows, strict=True)]
    rates = [window.bytes_per_s for window in windows[1::2]]
    if median(rates) < RATE_FLOOR * BYTES_PER_S:
        raise RuntimeError(f"frames arrived at {median(rates) / 1e6:.0f} MB/s only")
    at_full_rate = [1 + (ratio - 1) * BYTES_PER_S / rate for ratio, rate in zip(_ratios(own_us), rates, strict=True)]
    return figure_of(
        QUIET_ENGINE,
        at_full_rate,
        megabytes_per_s=round(median(rates) / 1e6),
        as_measured=round(median(_ratios(own_us)), 2),
        wall=round(median(_ratios(wall_us)), 2),
        quiet_step_ms=round(median(own_us[::2]) / 1e3, 1),
        flooded_step_ms=round(median(own_us[1::2]) / 1e3, 1),
        steps=sum(len(window.steps_us(full)) for window in windows),
    )


def _ratios(step_us: Sequence[float]) -> list[float]:
    """Of each pair, on / off."""
    return [on / off for off, on in zip(step_us[::2], step_us[1::2], strict=True)]


if __name__ == "__main__":
    measured = asyncio.run(measure())
    save("quiet_engine", measured)
    print(*measured, sep="\n")
