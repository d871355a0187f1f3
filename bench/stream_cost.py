"""What the KV stream costs beside a bare copy: Source to Target through codec threads, frames and a link, against a
plain grpc.aio stream of as many bytes in messages of the same size.

    python -m bench.stream_cost

    stream   arena -> read, checksum, seal -> link -> verify, place -> arena, acknowledged and committed
    bare     as many messages, made before -> a reader that drops them

Two processes, the same two for both; they take turns, and a pair is one of each. The machines, host, job pool and
transport are the product's. Not measured here: prefill beside it (`overlap`), decode beside it (`quiet_engine`).
"""

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import grpc

from bench.figures import Bar, Figure, figure_of, save
from control_plane.agent.tuning import settle_interpreter
from engine.base import limits
from engine.base.asyncio_host import AsyncioHost, JobPool
from engine.base.machine import Command, Dial, JobDone, LinkUp, Received, Started, Tick
from engine.executors.paced import smollm2_schema
from engine.kv.arena import Arena
from kv_transfer import frame as frames
from kv_transfer.codecs import CodecSet
from kv_transfer.custody import Custody
from kv_transfer.jobs import atoms
from kv_transfer.source import Binding, Delivered, DeliveryFailed, Source
from kv_transfer.target import ArrivalFailed, Arrived, Target
from kv_transfer.transports.grpc import GrpcTransport

CONTEXT_TOKENS = 2_048
CHUNK_TOKENS = 512  # what a prefill step announces at once
PAIRS = 16
WARM_UP = 2
EPOCH = 1
TOKEN = 1  # what the source "sampled"
BARE_METHOD = "/bench.Bare/Copy"
PEER = "bulk/peer"

SCHEMA = smollm2_schema()
CODECS = CodecSet(SCHEMA.kv)
COLUMNS = CONTEXT_TOKENS // limits.BLOCK_SIZE_TOKENS

STREAM = Bar(
    name="raw KV stream",
    claim="bytes per second of the raw codec, beside a bare gRPC copy",
    unit="x",
    limit=0.6,
    at_least=True,
)
_aio: Any = grpc.aio
_UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


def arena() -> Arena:
    """Of one context, every page there."""
    memory = Arena(SCHEMA, columns=COLUMNS)
    memory.zero(range(COLUMNS))
    return memory


def regions() -> list[tuple[tuple[int, int], tuple[int, int]]]:
    layers = (0, SCHEMA.kv.layers)
    chunks = [(start, start + CHUNK_TOKENS) for start in range(0, CONTEXT_TOKENS, CHUNK_TOKENS)]
    return [(layers, chunk) for chunk in chunks]


def message_sizes() -> list[int]:
    """Of the frames of one transfer."""
    cut = (atom for layers, tokens in regions() for atom in atoms(SCHEMA.kv, layers, tokens))
    return [
        frames.HEADER_BYTES + (layers[1] - layers[0]) * (tokens[1] - tokens[0]) * SCHEMA.kv.token_layer_bytes
        for layers, tokens in cut
    ]


def transfer_id(number: int) -> bytes:
    """Both ends count transfers, so nobody has to be told."""
    return number.to_bytes(16, "little")


# -- the receiving process ---------------------------------------------------------------------------------------------
class Receiving:
    """A machine around a Target: one transfer open, always."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._custody = Custody()
        self._target = Target(
            SCHEMA,
            codecs=CODECS,
            custody=self._custody,
            mint_transfer_id=lambda: transfer_id(self._seq_id),
            job_keys=count(1),
            counters=Counter(),
            vocab_size=TOKEN + 1,
        )
        self._seq_id = 0

    def step(self, event: object, now_us: int) -> Sequence[object]:
        match event:
            case Started():
                self._open()
                return []
            case Received(link, message):
                return self._settle(self._target.on_frame(link, message, now_us))
            case JobDone():
                return self._settle(self._target.on_job(event, now_us))
        return []

    next_deadline_us = None

    def _open(self) -> None:
        self._seq_id = next(self._numbers)
        self._custody.begin(self._seq_id)
        table = tuple(range(COLUMNS))
        self._target.open(self._seq_id, table=table, skip_tokens=0, context_tokens=CONTEXT_TOKENS, epoch=EPOCH)

    def _settle(self, actions: Sequence[object]) -> list[object]:
        if any(isinstance(action, ArrivalFailed) for action in actions):
            raise RuntimeError(f"arrival failed: {actions}")
        if any(isinstance(action, Arrived) for action in actions):
            self._custody.end(self._seq_id)
            self._open()
        return [action for action in actions if not isinstance(action, Arrived | Command)]


async def receive() -> None:
    """Say both ports, then serve until standard input ends."""
    transport = GrpcTransport()
    host = AsyncioHost(Receiving(), transport, jobs=JobPool(memory=arena()))
    transport.listen("127.0.0.1:0", host.accept)
    await transport.start()
    host.start()
    server = _aio.server(options=_UNLIMITED)
    methods: dict[str, Any] = {"Copy": grpc.stream_unary_rpc_method_handler(_drop_all)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Bare", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(transport.port, port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await host.close()
    await transport.close()
    await server.stop(None)


async def _drop_all(messages: AsyncIterator[bytes], _: Any) -> bytes:
    size = 0
    async for message in messages:
        size += len(message)
    return size.to_bytes(8, "little")


# -- the sending process -----------------------------------------------------------------------------------------------
class Send:
    """Input: move one whole context, now. `Delivered` is the output."""


class Sending:
    """A machine around a Source: one sequence at a time, all of its KV computed at once."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._custody = Custody()
        self._source = Source(SCHEMA, codecs=CODECS, custody=self._custody, job_keys=count(1), counters=Counter())
        self._seq_id = 0

    def step(self, event: object, now_us: int) -> Sequence[object]:
        match event:
            case Started():
                return [Dial(PEER, self._address, b"bench")]
            case LinkUp():
                return [event]
            case Send():
                return self._send(now_us)
            case Received(link, message):
                return self._settle(self._source.on_frame(link, message, now_us))
            case JobDone():
                return self._settle(self._source.on_job(event, now_us))
            case Tick():
                return self._settle(self._source.on_tick(now_us))
        return []

    @property
    def next_deadline_us(self) -> int | None:
        return self._source.next_deadline_us

    def _send(self, now_us: int) -> list[object]:
        self._seq_id += 1
        self._custody.begin(self._seq_id)
        self._source.hold(self._seq_id, tuple(range(COLUMNS)))
        binding = Binding(
            link=PEER,
            transfer_id=transfer_id(self._seq_id),
            epoch=EPOCH,
            skip_tokens=0,
            target_attempt=1,
        )
        actions = self._source.bind(self._seq_id, binding, now_us)
        for layers, tokens in regions():
            actions += self._source.computed(self._seq_id, layers, tokens, now_us)
        return self._settle([*actions, *self._source.complete(self._seq_id, ((TOKEN,),), now_us)])

    def _settle(self, actions: Sequence[object]) -> list[object]:
        if any(isinstance(action, DeliveryFailed) for action in actions):
            raise RuntimeError(f"delivery failed: {actions}")
        if any(isinstance(action, Delivered) for action in actions):
            self._custody.end(self._seq_id)
        return [action for action in actions if not isinstance(action, Command)]


class Stream:
    """The product's way from one arena to another."""

    def __init__(self, address: str) -> None:
        self._transport = GrpcTransport()
        self._arrived: asyncio.Queue[object] = asyncio.Queue()
        pool = JobPool(memory=arena())
        machine = Sending(address)
        self._host = AsyncioHost(machine, self._transport, outputs=self._arrived.put_nowait, jobs=pool)

    async def open(self) -> None:
        self._host.start()
        await self._arrived.get()

    async def copy(self) -> None:
        self._host.deliver(Send())
        await self._arrived.get()

    async def close(self) -> None:
        await self._host.close()
        await self._transport.close()


async def bare_copy(channel: Any, messages: Sequence[bytes]) -> None:
    call = channel.stream_unary(BARE_METHOD)()
    for message in messages:
        await call.write(message)
    await call.done_writing()
    if int.from_bytes(await call, "little") != sum(map(len, messages)):
        raise RuntimeError("the bare copy lost bytes")


@asynccontextmanager
async def receiver() -> AsyncIterator[tuple[int, int]]:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "bench.stream_cost", "receive")
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[1])
    assert process.stdout is not None
    ports = (await process.stdout.readline()).split()
    try:
        yield int(ports[0]), int(ports[1])
    finally:
        await process.communicate(b"")  # ends its standard input


async def measure(pairs: int = PAIRS) -> list[Figure]:
    sizes = message_sizes()
    messages = [os.urandom(size) for size in sizes]  # as many bytes as the arena holds, and as cold
    ratios, bare_rates = [], []
    async with (
        receiver() as (link_port, bare_port),
        _aio.insecure_channel(f"127.0.0.1:{bare_port}", options=_UNLIMITED) as channel,
    ):
        stream = Stream(f"127.0.0.1:{link_port}")
        await stream.open()
        for _ in range(WARM_UP + pairs):
            stream_s = await _timed(stream.copy())
            bare_s = await _timed(bare_copy(channel, messages))
            ratios.append(bare_s / stream_s)
            bare_rates.append(sum(sizes) / bare_s / 1e6)
        await stream.close()
    return [
        figure_of(
            STREAM,
            ratios[WARM_UP:],
            mebibytes=round(sum(sizes) / 2**20),
            message_kib=round(max(sizes) / 2**10),
            bare_megabytes_per_s=round(median(bare_rates[WARM_UP:])),
        )
    ]


async def _timed(work: Any) -> float:
    started_s = time.perf_counter()
    await work
    return time.perf_counter() - started_s


def main(arguments: Sequence[str]) -> None:
    settle_interpreter()  # as a worker's process does
    if arguments == ["receive"]:
        asyncio.run(receive())
        return
    measured = asyncio.run(measure())
    save("stream_cost", measured)
    print(*measured, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
