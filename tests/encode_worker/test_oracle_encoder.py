"""The oracle's encoder and the oracle's language model: what goes through both gives the reference's tokens."""

import numpy as np
import pytest

from encode_worker.encoders.oracle import OracleEncoder
from encode_worker.encoders.paced import PacedEncoder
from engine.commands import (
    AddEncode,
    AddPrefill,
    EmbeddingsReserved,
    EmbeddingWish,
    Encoded,
    EncodeItem,
    EncodeOutput,
    EncodePixels,
    EncodePlan,
    EngineCommand,
    EngineEvent,
    PixelsNeeded,
    Prefilled,
    Release,
    ReserveEmbeddings,
    TokensSampled,
)
from engine.core import EngineCore, assert_quiet
from engine.encode_core import EncodeCore
from engine.executors.joint import JointExecutor
from engine.executors.oracle import OracleExecutor, oracle_embedding, oracle_embedding_schema, reference_tokens
from engine.images import Picture, PlacedImage, PromptImage, Run
from engine.kv.arena import Arena
from engine.scheduler import Scheduler
from engine.types import SamplingParams
from engine.worker_engine import WorkerEngine

BLOCK = 4
ORACLE = OracleExecutor.Config(vocab_size=1 << 40)
GREEDY = SamplingParams(temperature=0.0, max_tokens=3)
PICTURES = (Picture(2, 1, b"RGBrgb"), Picture(1, 2, b"RGBrgb"), Picture(1, 1, b"RGB"))
IMAGES = tuple(
    PromptImage(key=bytes([n]) * 16, runs=(Run(start, tokens),))
    for n, (start, tokens) in enumerate([(1, 5), (8, 3), (12, 9)])
)
PROMPT = tuple(
    7 if any(r.token_start <= i < r.token_start + r.tokens for m in IMAGES for r in m.runs) else 100 + i
    for i in range(23)
)


class Worker:
    """A worker that encodes and prefills, and the role that would command it."""

    def __init__(self, embedding_columns: int = 12) -> None:
        kv = Arena(ORACLE.schema, columns=16, block_size=BLOCK)
        embeddings = Arena(ORACLE.embedding_schema, columns=embedding_columns, block_size=BLOCK)
        self.core = WorkerEngine(
            EngineCore(Scheduler.Config(block_size=BLOCK, step_tokens=5), ORACLE.schema, kv),
            EncodeCore(EncodeCore.Config(batch_images=2), ORACLE.embedding_schema, embeddings),
        )
        self.executor = JointExecutor(OracleExecutor(kv, ORACLE, embeddings), OracleEncoder(embeddings))
        self.events: list[EngineEvent] = []

    def send(self, *commands: EngineCommand) -> None:
        for command in commands:
            self.events += self.core.handle(command, 0)

    def run(self) -> None:
        while plan := self.core.begin_step(0):
            self.events += self.core.take_events()
            self.events += self.core.finish_step(self.executor.execute(plan, lambda start, end: None), 0)

    def take(self, kind: type) -> list:
        taken = [event for event in self.events if isinstance(event, kind)]
        self.events = [event for event in self.events if not isinstance(event, kind)]
        return taken

    def encode(self, pictures: tuple[Picture, ...]) -> None:
        for n, image in enumerate(IMAGES):
            self.send(AddEncode(seq_id=10 + n, key=image.key, features=image.features))
        for wanted in self.take(PixelsNeeded):
            self.send(EncodePixels(seq_id=wanted.seq_id, picture=pictures[wanted.seq_id - 10]))
        self.run()

    def answer(self) -> list[int]:
        wishes = tuple(EmbeddingWish(20 + n, image.key, image.features) for n, image in enumerate(IMAGES))
        self.send(ReserveEmbeddings(wishes=wishes))
        (reserved,) = self.take(EmbeddingsReserved)
        assert all(grant.cached for grant in reserved.grants)
        placed = tuple(PlacedImage(m, grant.block_table) for m, grant in zip(IMAGES, reserved.grants, strict=True))
        command = AddPrefill(
            seq_id=1, token_ids=PROMPT, prompt_tokens=len(PROMPT), sampling=GREEDY, decode_here=True, images=placed
        )
        self.send(command)
        self.run()
        tokens = [
            token for event in self.events if isinstance(event, Prefilled | TokensSampled) for token in event.tokens
        ]
        return [token.token_id for token in tokens]

    def close(self) -> None:
        for seq_id in (1, *(base + n for base in (10, 20) for n in range(len(IMAGES)))):
            self.send(Release(seq_id=seq_id))
        assert_quiet(self.core)


def expected(pictures: tuple[Picture, ...] = PICTURES) -> list[int]:
    images = tuple(zip(IMAGES, pictures, strict=True))
    return list(reference_tokens(PROMPT, "", GREEDY, 3, ORACLE, images=images))


def test_an_answer_about_three_images() -> None:
    worker = Worker()
    worker.encode(PICTURES)
    assert [event.cached for event in worker.take(Encoded)] == [False] * 3
    assert worker.answer() == expected()
    assert worker.core.load().vision_forwards == 3
    worker.close()


def test_repeated_images_go_through_no_tower_and_give_the_same_answer() -> None:
    worker = Worker()
    worker.encode(PICTURES)
    worker.close()
    worker.take(Encoded)
    worker.encode(PICTURES)
    assert [event.cached for event in worker.take(Encoded)] == [True] * 3
    assert worker.answer() == expected()
    assert worker.core.load().vision_forwards == 3
    worker.close()


@pytest.mark.parametrize("which", range(3))
def test_another_picture_gives_another_answer(which: int) -> None:
    other = Picture(1, 1, b"BGR")
    pictures = (*PICTURES[:which], other, *PICTURES[which + 1 :])
    worker = Worker()
    worker.encode(pictures)
    answer = worker.answer()
    assert answer == expected(pictures)
    assert answer != expected()


def test_an_embedding_is_made_of_pixels_shape_key_and_row() -> None:
    schema = oracle_embedding_schema()
    picture, key = PICTURES[0], b"k" * 16
    rows_TR = oracle_embedding(picture, key, 5, schema)
    assert rows_TR.shape == (5, schema.token_bytes)
    assert len(np.unique(rows_TR, axis=0)) == 5
    others = [
        oracle_embedding(PICTURES[1], key, 5, schema),  # the same pixels in another shape
        oracle_embedding(Picture(2, 1, b"RGBrgB"), key, 5, schema),
        oracle_embedding(picture, b"K" * 16, 5, schema),
        oracle_embedding(picture, key, 6, schema)[:5],
    ]
    for other in others:
        assert (other != rows_TR).any(axis=1).all()
    np.testing.assert_array_equal(oracle_embedding(picture, key, 5, schema), rows_TR)


@pytest.mark.parametrize("hidden", [3, 16, 24])
def test_rows_are_written_where_the_table_says(hidden: int) -> None:
    schema = oracle_embedding_schema(hidden=hidden)
    arena = Arena(schema, columns=4, block_size=BLOCK)
    arena.poison(range(4))
    item = EncodeItem(1, PICTURES[0], 6, (3, 1), b"k" * 16)
    assert OracleEncoder(arena).encode(EncodePlan(7, (item,))) == EncodeOutput(7)
    written_TX = arena.read((3, 1), (0, 1), (0, 6))[0, 0, 0]
    np.testing.assert_array_equal(written_TX, oracle_embedding(PICTURES[0], b"k" * 16, 6, schema))
    untouched = [arena.bytes_CLHPSX[0], arena.bytes_CLHPSX[2], arena.bytes_CLHPSX[1, ..., 2:, :]]
    assert all((memory == 0xFF).all() for memory in untouched)


def test_a_paced_encoder_takes_its_time_for_each_image() -> None:
    arena = Arena(oracle_embedding_schema(), columns=4, block_size=BLOCK)
    slept: list[float] = []
    items = tuple(EncodeItem(n, PICTURES[0], 4, (n,), bytes(16)) for n in range(3))
    encoder = PacedEncoder(OracleEncoder(arena), 300_000, slept.append)
    assert encoder.encode(EncodePlan(2, items)) == EncodeOutput(2)
    assert slept == [pytest.approx(0.9)]
    np.testing.assert_array_equal(
        arena.read((2,), (0, 1), (0, 4))[0, 0, 0], oracle_embedding(PICTURES[0], bytes(16), 4, arena.schema)
    )
