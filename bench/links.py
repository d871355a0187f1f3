"""What a gRPC link costs beside a bare grpc.aio stream of bytes, over loopback.

    python -m bench.links [--small 20000] [--big 400] [--rounds 3]

Both ends live in one process and on one loop, so "per end" is half of the process's CPU time (gRPC's own threads
included). Rounds alternate between the two, and the best of each is shown: the machine may be busy with other things.
It does not measure a network, nor what a host adds.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from engine.base.link import Link, LinkHandler
from kv_transfer.transports.grpc import GrpcTransport

WINDOW = 8  # messages between two looks at the loop; a transfer's window, and little enough to be no slow reader
SMALL_BYTES = 100
BIG_BYTES = 1 << 20

_aio: Any = grpc.aio
_UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    wall_s: float
    cpu_s: float
    messages: int
    message_bytes: int

    @property
    def cpu_us_per_end(self) -> float:
        return self.cpu_s / self.messages / 2 * 1e6

    @property
    def megabytes_per_second(self) -> float:
        return self.messages * self.message_bytes / self.wall_s / 1e6


class Counter:
    """Counts messages and says when all are there."""

    def __init__(self, expected: int) -> None:
        self._left = expected
        self.room = asyncio.Event()
        self.all_arrived = asyncio.Event()

    def on_message(self, message: bytes) -> None:
        self._left -= 1
        if self._left % WINDOW == 0:
            self.room.set()
        if self._left == 0:
            self.all_arrived.set()

    def on_lost(self, reason: str) -> None: ...


async def through_link(messages: int, message_bytes: int) -> Cost:
    """Sends two windows, and the next whenever one has arrived."""
    counter = Counter(messages)

    def accept(link: Link, hello: bytes) -> LinkHandler:
        return counter

    transport, opened = GrpcTransport(), asyncio.Event()
    transport.listen("127.0.0.1:0", accept)
    await transport.start()
    link = transport.dial(f"127.0.0.1:{transport.port}", b"hello", Counter(0), opened.set)
    await opened.wait()

    async def send_all() -> None:
        message = bytes(message_bytes)
        counter.room.set()
        for index in range(messages):
            if index % WINDOW == 0 and index > WINDOW:
                await counter.room.wait()
                counter.room.clear()
            link.send(message)
        await counter.all_arrived.wait()

    cost = await _measured(send_all, messages, message_bytes)
    await transport.close()
    return cost


async def through_bare_stream(messages: int, message_bytes: int) -> Cost:
    counter = Counter(messages)

    async def serve(_: Any, context: Any) -> None:
        while (message := await context.read()) is not _aio.EOF:
            counter.on_message(message)

    server = _aio.server(options=_UNLIMITED)
    methods = {"Open": grpc.stream_stream_rpc_method_handler(serve)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bare", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with _aio.insecure_channel(f"127.0.0.1:{port}", options=_UNLIMITED) as channel:
        call = channel.stream_stream("/bench.Bare/Open")()

        async def send_all() -> None:
            message = bytes(message_bytes)
            for _ in range(messages):
                await call.write(message)
            await counter.all_arrived.wait()

        cost = await _measured(send_all, messages, message_bytes)
        await call.done_writing()
    await server.stop(None)
    return cost


async def _measured(work: Callable[[], Awaitable[None]], messages: int, message_bytes: int) -> Cost:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    await work()
    return Cost(time.perf_counter() - wall_s, time.process_time() - cpu_s, messages, message_bytes)


_PATHS = {"bare stream": through_bare_stream, "link": through_link}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=20_000, help=f"messages of {SMALL_BYTES} bytes")
    parser.add_argument("--big", type=int, default=400, help="messages of 1 MiB")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    costs: dict[str, tuple[list[Cost], list[Cost]]] = {name: ([], []) for name in _PATHS}
    for _ in range(arguments.rounds):
        for name, run in _PATHS.items():
            small, big = costs[name]
            small.append(asyncio.run(run(arguments.small, SMALL_BYTES)))
            big.append(asyncio.run(run(arguments.big, BIG_BYTES)))
    for name, (small, big) in costs.items():
        cpu_us = min(cost.cpu_us_per_end for cost in small)
        rate = max(cost.megabytes_per_second for cost in big)
        print(f"{name:12} {cpu_us:6.1f} us CPU per small message and end   {rate:7.0f} MB/s in 1 MiB messages")


if __name__ == "__main__":
    main()
