"""EncodeRole: what scenarios do not show. Pixels are put together without a copy, and their memory has a bound."""

import random
import tracemalloc

import pytest

from encode_worker.role import EncodeRole
from engine.base.errors import Status
from engine.base.machine import Command
from engine.commands import AddEncode, Encoded, EncodePixels, PixelsNeeded, Release
from engine.images import Picture
from kv_transfer.codecs import CodecSet
from kv_transfer.custody import Custody
from kv_transfer.reports import AttemptOver, EncodeWork, PixelsWanted
from kv_transfer.reports import Encoded as EncodedReport
from kv_transfer.source import Source
from tests.scenarios.transfer_scripts import EMBEDDINGS

AHEAD_BYTES = 1_000


class Worker:
    """A role, and what surrounds it."""

    def __init__(self, ahead_bytes: int = AHEAD_BYTES) -> None:
        self.custody = Custody()
        self.source = Source(
            EMBEDDINGS,
            codecs=CodecSet(EMBEDDINGS.kv),
            custody=self.custody,
            job_keys=iter(range(100)),
            counters={},  # type: ignore[arg-type]
        )
        self.role = EncodeRole(source=self.source, custody=self.custody, ahead_bytes=ahead_bytes)

    def add(self, seq_id: int, width: int = 2, height: int = 2) -> EncodeWork:
        work = EncodeWork(seq_id=seq_id, key=bytes(16), features=4, width=width, height=height, priority=-seq_id)
        self.added = self.role.add(work)
        return work

    def need(self, seq_id: int) -> list[int]:
        """The engine needs its pixels; whose are asked for."""
        return wanted(self.role.on_pixels_needed(PixelsNeeded(seq_id=seq_id)))

    def encoded(self, seq_id: int) -> list[object]:
        return self.role.on_encoded(Encoded(seq_id=seq_id, block_table=(0,)), 0)


def wanted(items: list[object]) -> list[int]:
    return [item.seq_id for item in items if isinstance(item, PixelsWanted)]


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_the_engine_hears_what_the_router_said(worker: Worker) -> None:
    work = worker.add(3)
    command = AddEncode(seq_id=3, key=work.key, features=4, priority=-3)
    assert worker.added == [Command(command)]
    assert worker.role.owns(3) and len(worker.role) == len(worker.custody) == 1


def test_pieces_of_any_size_make_the_picture(worker: Worker) -> None:
    dice = random.Random(1)
    pixels = dice.randbytes(2 * 50 * 3)
    worker.add(1, width=2, height=50)
    worker.need(1)
    offset, done = 0, []
    while offset < len(pixels):
        assert done == []
        size = dice.randint(1, 70)
        done = worker.role.pixels(1, offset, pixels[offset : offset + size])
        offset += size
    assert done == [Command(EncodePixels(seq_id=1, picture=Picture(2, 50, pixels)))]


def test_a_large_picture_is_asked_for_a_stretch_at_a_time() -> None:
    worker, whole = Worker(ahead_bytes=100 << 20), random.Random(2).randbytes(1_024 * 700 * 3)
    worker.add(1, width=1_024, height=700)
    asked = worker.role.on_pixels_needed(PixelsNeeded(seq_id=1))
    stretches = []
    while isinstance(wish := asked[0], PixelsWanted):
        stretches.append((wish.offset, wish.length))
        half, end = wish.offset + wish.length // 2, wish.offset + wish.length
        assert worker.role.pixels(1, wish.offset, whole[wish.offset : half]) == []
        asked = worker.role.pixels(1, half, whole[half:end])
    mib = 1 << 20
    assert stretches == [(0, mib), (mib, mib), (2 * mib, len(whole) - 2 * mib)]
    assert asked == [Command(EncodePixels(seq_id=1, picture=Picture(1_024, 700, whole)))]


def test_what_was_not_asked_for_is_not_taken() -> None:
    worker = Worker(ahead_bytes=100 << 20)
    worker.add(1, width=1_024, height=1_024)
    worker.role.on_pixels_needed(PixelsNeeded(seq_id=1))
    worker.role.pixels(1, 0, bytes((1 << 20) - 1))
    over = AttemptOver(seq_id=1, status=Status.INTERNAL, reason="pixels")
    assert worker.role.pixels(1, (1 << 20) - 1, bytes(2))[-1] == over


def test_a_large_picture_costs_its_size_once() -> None:
    worker, side, piece = Worker(ahead_bytes=100 << 20), 2_048, bytes(256 << 10)
    total_bytes = side * side * 3
    tracemalloc.start()
    try:
        worker.add(1, width=side, height=side)
        worker.need(1)
        for offset in range(0, total_bytes, len(piece)):
            done = worker.role.pixels(1, offset, piece)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(done) == 1
    assert total_bytes <= peak_bytes < total_bytes + (1 << 20)


def test_pieces_that_do_not_fit_fail_the_attempt_as_an_engine_would(worker: Worker) -> None:
    worker.add(1)
    worker.need(1)
    over = AttemptOver(seq_id=1, status=Status.INTERNAL, reason="pixels")
    assert worker.role.pixels(1, 1, b"x") == [Command(Release(seq_id=1)), over]
    assert worker.role.pixels(1, 0, bytes(12)) == []
    assert len(worker.role) == len(worker.custody) == 0


def test_pixels_ahead_are_bounded_in_order(worker: Worker) -> None:
    for seq_id in range(1, 6):
        worker.add(seq_id, width=10, height=10)  # 300 bytes
    assert [worker.need(seq_id) for seq_id in range(1, 6)] == [[1], [2], [3], [], []]
    worker.role.pixels(1, 0, bytes(300))
    assert wanted(worker.encoded(1)) == [4]
    assert wanted(worker.role.abort(2)) == [5]
    assert worker.role.abort(2) == []


def test_one_image_always_may(worker: Worker) -> None:
    worker.add(1, width=40, height=40)
    worker.add(2, width=1, height=1)
    assert worker.need(1) == [1]
    assert worker.need(2) == []
    assert wanted(worker.encoded(1)) == [2]


def test_who_waits_first_is_not_overtaken_and_not_in_the_way_when_it_is_gone(worker: Worker) -> None:
    for seq_id, side in ((1, 10), (2, 17), (3, 1)):
        worker.add(seq_id, width=side, height=side)
    assert [worker.need(seq_id) for seq_id in (1, 2, 3)] == [[1], [], []]
    assert wanted(worker.role.abort(2)) == [3]


def test_what_is_not_ours_is_nothing(worker: Worker) -> None:
    assert worker.need(9) == worker.encoded(9) == worker.role.pixels(9, 0, b"x") == worker.role.abort(9) == []


def test_held_until_it_is_over(worker: Worker) -> None:
    worker.add(1)
    assert worker.encoded(1) == [EncodedReport(seq_id=1, cached=False)]
    assert worker.source.holds(1)
    assert worker.role.abort(1) == [Command(Release(seq_id=1))]
    assert len(worker.source) == len(worker.custody) == 0
