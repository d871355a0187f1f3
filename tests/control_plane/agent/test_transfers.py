"""Transfers: KV and embeddings between two workers, over one link, each through its own Source and Target."""

from collections import Counter
from functools import partial
from random import Random

import numpy as np
import pytest

from control_plane.agent.transfers import Ends, Transfers
from engine.base import limits
from engine.base.machine import Command, JobDone, Run, Send
from engine.executors.oracle import oracle_schema
from engine.kv.arena import Arena, Arenas
from engine.kv.schema import CacheSchema, Stream
from kv_transfer.codecs import CodecSet, Encoding
from kv_transfer.custody import Custody
from kv_transfer.frame import FrameHeader, FrameKind, seal
from kv_transfer.source import Binding, Delivered
from kv_transfer.target import Arrived

KV = oracle_schema()
HIDDEN = 1_024
IMAGE = Stream(
    name="image",
    layers=1,
    heads=1,
    parts=1,
    head_dim=HIDDEN,
    dtype="float32",
    position_encoding="none",
    role="embedding",
)
EMBEDDINGS = CacheSchema("oracle", (IMAGE,))
FEATURES = 3 * limits.FRAME_PAYLOAD_BYTES_MAX // IMAGE.token_layer_bytes + 5  # several frames
LINK = "bulk"


class Worker:
    def __init__(self, seed: int, block_size: int) -> None:
        self.custody, self.counters = Custody(), Counter[str]()
        self.transfers = Transfers(
            custody=self.custody,
            counters=self.counters,
            mint_transfer_id=partial(Random(seed).randbytes, 16),
            vocab_size=1_000,
        )
        self.kv = self.transfers.add(KV, CodecSet(KV.kv))
        self.images = self.transfers.add(EMBEDDINGS, CodecSet(IMAGE))
        columns = -(-FEATURES // block_size) + 8
        self.memory = Arenas(*(Arena(schema, columns=columns, block_size=block_size) for schema in (KV, EMBEDDINGS)))
        for schema in (KV, EMBEDDINGS):
            array = self.memory.of(schema.digest).array
            array[:] = np.random.default_rng(seed).integers(0, 256, array.shape, np.uint8)

    def table(self, tokens: int, block_size: int) -> tuple[int, ...]:
        return tuple(range(1, 2 + -(-tokens // block_size)))


class Pair:
    """A worker that sends, one that receives, and a link that mixes their frames up."""

    def __init__(self, seed: int) -> None:
        self.dice = Random(seed)
        self.sender, self.receiver = Worker(1, block_size=16), Worker(2, block_size=4)
        self.outcomes: list[object] = []
        self._under_way: list[tuple[Worker, object]] = []

    def take(self, worker: Worker, actions: list[object]) -> None:
        for action in actions:
            match action:
                case Send() | Run():
                    self._under_way.append((worker, action))
                case Command():
                    pass
                case _:
                    self.outcomes.append(action)

    def play(self) -> None:
        while self._under_way:
            worker, action = self._under_way.pop(self.dice.randrange(len(self._under_way)))
            if isinstance(action, Run):
                done = JobDone(action.key, result=action.job.run(worker.memory))
                self.take(worker, worker.transfers.on_job(done, 0))
            elif isinstance(action, Send) and worker is self.sender:
                self.take(self.receiver, self.receiver.transfers.on_frame(LINK, action.message, 0))
            elif isinstance(action, Send):
                self.take(self.sender, self.sender.transfers.on_answer(LINK, action.message, 0))

    def send(self, seq_id: int, source: Ends, target: Ends, tokens: int, branches: tuple[tuple[int, ...], ...]) -> None:
        """`branches` are those of END; with one that goes on after images, positions do, too."""
        for worker in (self.sender, self.receiver):
            worker.custody.begin(seq_id)
        transfer_id = target.target.open(
            seq_id,
            table=self.receiver.table(tokens, 4),
            skip_tokens=0,
            context_tokens=tokens,
            epoch=3,
            choices=len(branches),
        )
        source.source.hold(seq_id, self.sender.table(tokens, 16), final_tokens=tokens)
        delta = -2 if branches else 0
        self.take(self.sender, source.source.complete(seq_id, branches, 0, rope_delta=delta))
        binding = Binding(link=LINK, transfer_id=transfer_id, epoch=3, skip_tokens=0, target_attempt=1)
        self.take(self.sender, source.source.bind(seq_id, binding, 0))

    def read(self, worker: Worker, schema: CacheSchema, tokens: int, block_size: int) -> np.ndarray:
        arena = worker.memory.of(schema.digest)
        return arena.read(worker.table(tokens, block_size), (0, schema.kv.layers), (0, tokens))


@pytest.mark.parametrize("seed", range(8))
def test_an_embedding_and_kv_cross_each_other(seed: int) -> None:
    pair = Pair(seed)
    pair.send(1, pair.sender.images, pair.receiver.images, FEATURES, branches=())
    pair.send(2, pair.sender.kv, pair.receiver.kv, tokens=9, branches=((100,),))
    pair.play()
    for schema, tokens in ((KV, 9), (EMBEDDINGS, FEATURES)):
        sent, received = pair.read(pair.sender, schema, tokens, 16), pair.read(pair.receiver, schema, tokens, 4)
        assert np.array_equal(sent, received)
    arrived = {each.seq_id: each for each in pair.outcomes if isinstance(each, Arrived)}
    assert (arrived[1].branches, arrived[1].rope_delta) == ((), 0)
    assert (arrived[2].branches, arrived[2].rope_delta) == (((100,),), -2)
    assert sum(isinstance(each, Delivered) for each in pair.outcomes) == 2
    assert len(pair.sender.transfers) == len(pair.receiver.transfers) == 0
    assert pair.receiver.counters == {}


def test_what_fails_fails_for_both_kinds() -> None:
    pair = Pair(0)
    pair.send(1, pair.sender.images, pair.receiver.images, 4, branches=())
    pair.send(2, pair.sender.kv, pair.receiver.kv, tokens=4, branches=((100,),))
    assert len(pair.sender.transfers) == len(pair.receiver.transfers) == 2
    lost = pair.sender.transfers.on_target_lost(LINK)
    assert [outcome.seq_id for outcome in lost] == [2, 1]  # type: ignore[attr-defined]
    pair.play()
    assert pair.receiver.transfers.on_source_lost(LINK) == []  # nothing has come over it yet
    assert pair.sender.transfers.next_deadline_us is None


def test_silence_of_either_kind_is_noticed() -> None:
    pair = Pair(0)
    pair.send(1, pair.sender.images, pair.receiver.images, 4, branches=())
    (_, run) = pair._under_way.pop()
    assert isinstance(run, Run)
    sender = pair.sender
    frames = sender.transfers.on_job(JobDone(run.key, result=run.job.run(sender.memory)), 0)
    assert sender.transfers.next_deadline_us == limits.FRAME_RESEND_AFTER_MS * 1_000
    assert sender.transfers.on_tick(limits.FRAME_RESEND_AFTER_MS * 1_000) == frames
    (aborted,) = sender.transfers.unbind(1)
    assert isinstance(aborted, Send)


def test_a_frame_of_no_schema_of_ours_is_refused() -> None:
    worker = Worker(1, block_size=4)
    header = FrameHeader(kind=FrameKind.ABORT, transfer_id=bytes(16), epoch=1, sequence=0, schema_digest=bytes(16))
    for data in (b"", b"\xff" * 200, seal(header, [])):
        assert worker.transfers.on_frame(LINK, data, 0) == worker.transfers.on_answer(LINK, data, 0) == []
    assert worker.counters == {
        "frames_rejected:length": 2,
        "frames_rejected:magic": 2,
        "frames_rejected:kind": 1,
        "frames_rejected:transfer": 1,
    }


def test_embeddings_travel_raw() -> None:
    codecs = CodecSet(IMAGE)
    assert codecs.names() == ("raw",)
    assert not codecs.has(Encoding("int8"))
