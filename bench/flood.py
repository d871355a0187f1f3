"""A process that sends one worker well-formed frames for real reservations, at a steady rate, while it is told to.

    python -m bench.flood HOST:PORT        started by bench.quiet_engine
    stdin   "on" | "off", a line each      stdout   "ready"; after each "off" a line of JSON: bytes, seconds

It speaks a router's and a source's protocol with the product's own session and frame code, so the worker does all that
it does for a prefill worker: parse, verify, decode, place, acknowledge. No transfer is ever ended: when one is full it
is aborted, and the next begins.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator

from bench.overlap import ENGINE
from control_plane.model_choice import choose_model
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session, hello
from control_plane.wire.translate import sampling_to_wire
from engine.base import limits
from engine.base.keepalive import KEEPALIVE
from engine.base.link import Link
from engine.kv.schema import CacheSchema
from engine.types import SamplingParams
from kv_transfer import frame as frames
from kv_transfer.frame import FrameHeader, FrameKind
from kv_transfer.jobs import atoms
from kv_transfer.transports.grpc import GrpcTransport

BYTES_PER_S = 200e6
CONTEXT_TOKENS = 1_024
CHUNK_TOKENS = 512  # what a prefill step announces at once
BEHIND_MAX_S = 0.02  # a sender that was held up catches up by no more than this: a burst is no steady rate


class Peer:
    """One link to the worker; waits end with an error when it is lost."""

    def __init__(self) -> None:
        self._link: Link | None = None
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def dial(self, transport: GrpcTransport, address: str, kind: pb.Hello.Kind) -> None:
        self._link = transport.dial(address, hello(kind, "flood"), self, lambda: None)

    def send(self, message: bytes) -> None:
        assert self._link is not None
        self._link.send(message)

    def on_message(self, message: bytes) -> None: ...

    def on_lost(self, reason: str) -> None:
        if not self._lost.done():
            self._lost.set_exception(ConnectionError(f"link lost: {reason}"))

    async def keep(self) -> None:
        """Until it is lost."""
        while not (await asyncio.wait([self._lost], timeout=limits.KEEPALIVE_INTERVAL_MS / 1_000))[0]:
            self.send(KEEPALIVE)
        self._lost.result()


class Reservations(Peer):
    """A router's side: memory at the worker, one transfer after the other."""

    def __init__(self, schema: CacheSchema) -> None:
        super().__init__()
        self._schema = schema
        self._session = Session()
        self._granted: asyncio.Queue[bytes] = asyncio.Queue(1)
        self._request = 0
        self.epoch: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def next(self) -> bytes:
        """Give the last reservation back; the id of a new one."""
        if self._request:
            abort = pb.Abort(request=self._request, attempt=1)
            self.send(self._session.seal(pb.RouterToWorker(abort=abort)))
        self._request += 1
        reserve = pb.Reserve(
            request=self._request,
            attempt=1,
            epoch=await self.epoch,
            schema_digest=self._schema.digest,
            token_ids=[1] * CONTEXT_TOKENS,
            prompt_tokens=CONTEXT_TOKENS,
            sampling=sampling_to_wire(SamplingParams(max_tokens=2)),
            deadline_ms=limits.REQUEST_DEADLINE_MS_MAX,
        )
        self.send(self._session.seal(pb.RouterToWorker(reserve=reserve)))
        return await self._granted.get()

    def on_message(self, message: bytes) -> None:
        envelope = self._session.open_untrusted(pb.WorkerToRouter, message)
        match envelope.WhichOneof("body"):
            case "status" if not self.epoch.done():
                self.epoch.set_result(envelope.status.epoch)
            case "reserved":
                self._granted.put_nowait(envelope.reserved.transfer_id)
            case "refused" | "failed":
                raise RuntimeError(f"the worker refuses: {envelope}")


class Frames(Peer):
    """A source's side: at most a window of frames unacknowledged."""

    def __init__(self) -> None:
        super().__init__()
        self._payload = memoryview(bytes(range(256)) * (limits.FRAME_PAYLOAD_BYTES_MAX // 256))
        self._in_flight: dict[int, int] = {}
        self._answered = asyncio.Event()
        self.bytes_acknowledged = 0

    async def send_frame(self, header: FrameHeader) -> None:
        await self.until_in_flight(limits.FRAME_WINDOW - 1)
        self._in_flight[header.sequence] = header.raw_bytes
        self.send(frames.seal(header, [self._payload[: header.raw_bytes]]))

    async def until_in_flight(self, count: int) -> None:
        while len(self._in_flight) > count:
            self._answered.clear()
            await self._answered.wait()

    def on_message(self, message: bytes) -> None:
        header = frames.parse_header_untrusted(message)
        if header.kind is not FrameKind.ACK:
            raise RuntimeError(f"not an acknowledgement: {header}")
        self.bytes_acknowledged += self._in_flight.pop(header.sequence)
        self._answered.set()


async def headers(schema: CacheSchema, reservations: Reservations, out: Frames) -> AsyncIterator[FrameHeader]:
    """Endlessly what sources would send of prompts, transfer by transfer."""
    kv = schema.kv
    while True:
        transfer_id = await reservations.next()
        chunks = ((start, start + CHUNK_TOKENS) for start in range(0, CONTEXT_TOKENS, CHUNK_TOKENS))
        regions = (region for chunk in chunks for region in atoms(kv, (0, kv.layers), chunk))
        for sequence, (layers, tokens) in enumerate(regions):
            yield FrameHeader(
                kind=FrameKind.DATA,
                transfer_id=transfer_id,
                epoch=await reservations.epoch,
                sequence=sequence,
                schema_digest=schema.digest,
                codec="raw",
                layer_start=layers[0],
                layer_end=layers[1],
                token_start=tokens[0],
                token_end=tokens[1],
                head_end=kv.heads,
                raw_bytes=(layers[1] - layers[0]) * (tokens[1] - tokens[0]) * kv.token_layer_bytes,
            )
        await out.until_in_flight(0)


async def flood(schema: CacheSchema, reservations: Reservations, out: Frames, wanted: asyncio.Event) -> None:
    """Frames while wanted; whenever that ends, a report."""
    loop, endless = asyncio.get_running_loop(), headers(schema, reservations, out)
    while await wanted.wait():
        started_s = due_s = loop.time()
        acknowledged = out.bytes_acknowledged
        while wanted.is_set():
            header = await anext(endless)
            await out.send_frame(header)
            due_s = max(due_s, loop.time() - BEHIND_MAX_S) + header.raw_bytes / BYTES_PER_S
            await asyncio.sleep(due_s - loop.time())
        await out.until_in_flight(0)
        say(json.dumps({"bytes": out.bytes_acknowledged - acknowledged, "seconds": loop.time() - started_s}))


async def obey(wanted: asyncio.Event) -> None:
    """Until standard input ends."""
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    say("ready")
    while command := await commands.readline():
        (wanted.set if command == b"on\n" else wanted.clear)()


async def serve(address: str) -> None:
    schema, transport, wanted = choose_model(ENGINE).schema, GrpcTransport(), asyncio.Event()
    reservations, out = Reservations(schema), Frames()
    reservations.dial(transport, address, pb.Hello.ROUTER_TO_WORKER)
    out.dial(transport, address, pb.Hello.WORKER_TO_WORKER)
    await reservations.epoch
    work = [flood(schema, reservations, out, wanted), obey(wanted), reservations.keep(), out.keep()]
    tasks = [asyncio.create_task(one) for one in work]
    ended, going = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in going:
        task.cancel()
    await asyncio.gather(*going, return_exceptions=True)
    for task in ended:
        task.result()
    await transport.close()


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
