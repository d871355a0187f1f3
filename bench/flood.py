"""A process that sends one worker well-formed frames for real reservations, at a steady rate, while it is told to.

    python -m bench.flood HOST:PORT        started by bench.quiet_engine
    stdin   "on" | "off", a line each      stdout   "ready"; at each "off" a line of JSON: seconds, bytes_acknowledged

It speaks a router's and a source's protocol with the product's own session and frame code, so the worker does all that
it does for a prefill worker: parse, verify, decode, place, acknowledge. No transfer is ever ended: when one is full it
is aborted, and the next begins.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator

from bench.overlap import ENGINE
from control_plane.model_choice import choose_model
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session, hello
from engine.base import limits
from engine.base.link import Link
from engine.kv.schema import CacheSchema
from kv_transfer import frame as frames
from kv_transfer.frame import FrameHeader, FrameKind
from kv_transfer.jobs import atoms
from kv_transfer.transports.grpc import GrpcTransport

BYTES_PER_S = 200e6
CONTEXT_TOKENS = 1_024
CHUNK_TOKENS = 512  # what a prefill step announces at once
DEADLINE_MS = limits.REQUEST_DEADLINE_MS_MAX


class Reservations:
    """A router's side: memory at the worker, one transfer after the other."""

    def __init__(self, schema: CacheSchema) -> None:
        self._schema = schema
        self._session = Session()
        self._link: Link | None = None
        self._epoch: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._granted: asyncio.Queue[bytes] = asyncio.Queue()
        self._request = 0

    async def open(self, transport: GrpcTransport, address: str) -> None:
        self._link = transport.dial(address, hello(pb.Hello.ROUTER_TO_WORKER, "flood"), self, lambda: None)
        await self._epoch

    async def next(self) -> bytes:
        """Give the last reservation back; the id of a new one."""
        if self._request:
            self._send(pb.RouterToWorker(abort=pb.Abort(request=self._request, attempt=1)))
        self._request += 1
        reserve = pb.Reserve(
            request=self._request,
            attempt=1,
            epoch=self.epoch,
            schema_digest=self._schema.digest,
            token_ids=[1] * CONTEXT_TOKENS,
            prompt_tokens=CONTEXT_TOKENS,
            sampling=pb.Sampling(temperature=0, top_p=1, max_tokens=2),
            deadline_ms=DEADLINE_MS,
        )
        self._send(pb.RouterToWorker(reserve=reserve))
        return await self._granted.get()

    @property
    def epoch(self) -> int:
        return self._epoch.result()

    def _send(self, envelope: pb.RouterToWorker) -> None:
        assert self._link is not None
        self._link.send(self._session.seal(envelope))

    def on_message(self, message: bytes) -> None:
        envelope = self._session.open_untrusted(pb.WorkerToRouter, message)
        match envelope.WhichOneof("body"):
            case "status" if not self._epoch.done():
                self._epoch.set_result(envelope.status.epoch)
            case "reserved":
                self._granted.put_nowait(envelope.reserved.transfer_id)
            case "refused" | "failed":
                raise RuntimeError(f"the worker refuses: {envelope}")

    def on_lost(self, reason: str) -> None: ...


class Frames:
    """A source's side: frames out, at most a window of them unacknowledged."""

    def __init__(self, schema: CacheSchema) -> None:
        self._schema = schema
        self._link: Link | None = None
        self._opened = asyncio.Event()
        self._room = asyncio.Semaphore(limits.FRAME_WINDOW)
        self._payload = bytes(range(256)) * (limits.FRAME_PAYLOAD_BYTES_MAX // 256)
        self._in_flight: dict[tuple[bytes, int], int] = {}
        self.bytes_acknowledged = 0

    async def open(self, transport: GrpcTransport, address: str) -> None:
        introduction = hello(pb.Hello.WORKER_TO_WORKER, "flood")
        self._link = transport.dial(address, introduction, self, self._opened.set)
        await self._opened.wait()

    async def send(self, header: FrameHeader) -> None:
        await self._room.acquire()
        self._in_flight[header.transfer_id, header.sequence] = header.raw_bytes
        assert self._link is not None
        self._link.send(frames.seal(header, [memoryview(self._payload)[: header.raw_bytes]]))

    async def settle(self) -> None:
        """Until everything is acknowledged."""
        for _ in range(limits.FRAME_WINDOW):
            await self._room.acquire()
        for _ in range(limits.FRAME_WINDOW):
            self._room.release()

    def on_message(self, message: bytes) -> None:
        header = frames.parse_header_untrusted(message)
        if header.kind is not FrameKind.ACK:
            raise RuntimeError(f"not an acknowledgement: {header}")
        self.bytes_acknowledged += self._in_flight.pop((header.transfer_id, header.sequence))
        self._room.release()

    def on_lost(self, reason: str) -> None: ...

    def of_transfer(self, transfer_id: bytes, epoch: int) -> Iterator[FrameHeader]:
        """What a source would send of a prompt, in its order."""
        kv = self._schema.kv
        for start in range(0, CONTEXT_TOKENS, CHUNK_TOKENS):
            regions = atoms(kv, (0, kv.layers), (start, start + CHUNK_TOKENS))
            for (layer_start, layer_end), (token_start, token_end) in regions:
                yield FrameHeader(
                    kind=FrameKind.DATA,
                    transfer_id=transfer_id,
                    epoch=epoch,
                    sequence=start * kv.layers + layer_start,
                    schema_digest=self._schema.digest,
                    codec="raw",
                    layer_start=layer_start,
                    layer_end=layer_end,
                    token_start=token_start,
                    token_end=token_end,
                    head_end=kv.heads,
                    raw_bytes=(layer_end - layer_start) * (token_end - token_start) * kv.token_layer_bytes,
                )


async def flood(reservations: Reservations, out: Frames) -> None:
    """Until cancelled. Late frames are not caught up with: a burst is no steady rate."""
    loop = asyncio.get_running_loop()
    due_s = loop.time()
    while True:
        transfer_id = await reservations.next()
        for header in out.of_transfer(transfer_id, reservations.epoch):
            await out.send(header)
            due_s = max(due_s + header.raw_bytes / BYTES_PER_S, loop.time() - header.raw_bytes / BYTES_PER_S)
            await asyncio.sleep(due_s - loop.time())
        await out.settle()


async def serve(address: str) -> None:
    schema = choose_model(ENGINE).schema
    transport, commands = GrpcTransport(), asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    reservations, out = Reservations(schema), Frames(schema)
    await reservations.open(transport, address)
    await out.open(transport, address)
    _say("ready")
    while await commands.readline() == b"on\n":
        started_s, acknowledged = time.monotonic(), out.bytes_acknowledged
        flooding = asyncio.create_task(flood(reservations, out))
        await asyncio.wait([flooding, asyncio.create_task(commands.readline())], return_when=asyncio.FIRST_COMPLETED)
        if flooding.done():
            flooding.result()  # it never ends by itself: it has raised
        flooding.cancel()
        sent = {"seconds": time.monotonic() - started_s, "bytes_acknowledged": out.bytes_acknowledged - acknowledged}
        await out.settle()
        _say(json.dumps(sent))
    await transport.close()


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
