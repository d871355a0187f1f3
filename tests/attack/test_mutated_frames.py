"""Attack: damaged and forged frames against the whole receiving path. None is placed, and none raises anything else.

Two attackers. The first damages: 100,000 frames of every codec, with flipped bits, cut and extended tails, and header
fields that hold other plausible values, without a new checksum. The second can also seal, so its frames are intact and
only lie: what a lossy codec makes of them is of the declared shape, finite, and costs no more memory than the truth.
"""

import contextlib
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from xxhash import xxh3_64_intdigest

from engine.base import limits
from engine.base.errors import FrameError
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema, Stream
from kv_transfer import frame as frames
from kv_transfer.codecs import CodecSet, codecs, elements
from kv_transfer.frame import HEADER_BYTES, End, FrameHeader, FrameKind
from kv_transfer.jobs import DecodeJob, EncodeJob
from tests.kv_transfer.codecs import synthetic

KV = Stream(name="kv", layers=3, heads=2, head_dim=16, dtype="bfloat16")
SCHEMA = CacheSchema("m", (KV,))
TOKENS = 32
TABLE = (1, 0)
BLOCK = 16
SOME, ALL = 10_000, 100_000  # mutated frames
ALLOWANCE = 1.5  # of an atom's raw size, for decoding it: the result, and a part of it in another form

# Offset and format of each field, written down a second time: this file does not trust the parser's own table.
LAYOUT = {
    "magic": (0, "<4s"),
    "version": (4, "<H"),
    "kind": (6, "<H"),
    "checksum": (8, "<Q"),
    "transfer_id": (16, "<16s"),
    "epoch": (32, "<Q"),
    "sequence": (40, "<I"),
    "schema_digest": (44, "<16s"),
    "codec": (60, "<16s"),
    "level": (76, "<H"),
    "stream": (78, "<H"),
    "layer_start": (80, "<H"),
    "layer_end": (82, "<H"),
    "head_start": (84, "<H"),
    "head_end": (86, "<H"),
    "tp_rank": (88, "<H"),
    "tp_size": (90, "<H"),
    "token_start": (92, "<I"),
    "token_end": (96, "<I"),
    "payload_bytes": (100, "<I"),
    "raw_bytes": (104, "<I"),
    "tables": (108, "<I"),
}
END = End(branches=((5, 6), (), (7,)), frames=3, digest=11, rope_delta=-9)  # the second choice is over
END_OF_EMBEDDING = End(branches=(), frames=1, digest=5)
NUMBERS = [name for name, (_, form) in LAYOUT.items() if not form.endswith("s")]


def encodings() -> list[tuple[str, int]]:
    """Every codec; of many levels the first, the middle and the last."""
    found = []
    for name in codecs.names():
        levels = codecs.get(name).levels
        found += [(name, levels[index]) for index in sorted({0, len(levels) // 2, len(levels) - 1})]
    return found


pytestmark = pytest.mark.timeout(120)  # the first of them calibrates codecs and compiles their kernels
every_encoding = pytest.mark.parametrize(("codec", "level"), encodings())


def new_arena() -> Arena:
    return Arena(SCHEMA, columns=2, block_size=BLOCK)


def data_frame(codec: str, level: int, dice: random.Random) -> bytes:
    """All layers or one, from the start of the sequence or further on."""
    arena = new_arena()
    text_LHPTD = synthetic.kv(KV, TOKENS, seed=dice.randrange(100))
    arena.write(TABLE, (0, KV.layers), (0, TOKENS), None, elements.from_float32(text_LHPTD, KV.dtype))
    layers = dice.choice(((0, KV.layers), (0, 1), (2, 3)))
    start = dice.randrange(8)
    data = EncodeJob(
        header=data_header(codec, level, layers, (start, start + 16), dice), table=TABLE, codecs=codec_set()
    ).run(arena)
    assert frames.parse_header_untrusted(data).codec == codec  # it did not have to travel raw
    return data


def data_header(
    codec: str, level: int, layers: tuple[int, int], tokens: tuple[int, int], dice: random.Random
) -> FrameHeader:
    return FrameHeader(
        kind=FrameKind.DATA,
        transfer_id=dice.randbytes(16),
        epoch=dice.randrange(9),
        sequence=dice.randrange(99),
        schema_digest=SCHEMA.digest,
        codec=codec,
        level=level,
        layer_start=layers[0],
        layer_end=layers[1],
        token_start=tokens[0],
        token_end=tokens[1],
        head_end=KV.heads,
    )


def every_frame(dice: random.Random) -> list[bytes]:
    return [data_frame(codec, level, dice) for codec, level in encodings() for _ in range(4)]


def codec_set() -> CodecSet:
    return synthetic.codec_set(KV)


def end_frame(dice: random.Random, end: End = END) -> bytes:
    header = FrameHeader(
        kind=FrameKind.END, transfer_id=dice.randbytes(16), epoch=1, sequence=4, schema_digest=SCHEMA.digest
    )
    return frames.seal(header, [frames.serialize_end(end)])


def every_end(dice: random.Random) -> list[bytes]:
    return [end_frame(dice, end) for end in (END, END_OF_EMBEDDING) for _ in range(2)]


def receive(data: bytes, arena: Arena) -> object:
    """What a Target and its job do with a frame, in their order."""
    header = frames.parse_header_untrusted(data)
    if header.kind is not FrameKind.DATA:
        frames.verify_checksum_untrusted(data)
        return frames.parse_end_untrusted(frames.payload_of(data)) if header.kind is FrameKind.END else header
    frames.check_atom_untrusted(header, KV)
    return DecodeJob(frame=data, header=header, table=TABLE, codecs=codec_set()).run(arena)


def poke(data: bytes, name: str, value: int | bytes) -> bytes:
    offset, form = LAYOUT[name]
    field = struct.pack(form, value)
    return data[:offset] + field + data[offset + len(field) :]


def peek(data: bytes, name: str) -> int:
    offset, form = LAYOUT[name]
    return int(struct.unpack_from(form, data, offset)[0])


def reseal(data: bytes) -> bytes:
    return poke(data, "checksum", xxh3_64_intdigest(poke(data, "checksum", 0)))


# -- damage ------------------------------------------------------------------------------------------------------------
def flip_bits(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        changed[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def truncate(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def extend(data: bytes, dice: random.Random) -> bytes:
    return data + dice.randbytes(dice.randrange(1, 40))


def fit_length(data: bytes, dice: random.Random) -> bytes:
    """Cut or extend, and let the header agree."""
    changed = truncate(data, dice) if dice.random() < 0.5 else extend(data, dice)
    return poke(changed, "payload_bytes", len(changed) - HEADER_BYTES) if len(changed) >= HEADER_BYTES else changed


def overwrite_number(data: bytes, dice: random.Random) -> bytes:
    """A neighbouring or extreme value: most of these are plausible."""
    name = dice.choice(NUMBERS)
    largest = (1 << 8 * struct.calcsize(LAYOUT[name][1])) - 1
    value = dice.choice((0, 1, largest, peek(data, name) + 1, peek(data, name) - 1, dice.randrange(40)))
    return poke(data, name, value & largest)


def overwrite_text(data: bytes, dice: random.Random) -> bytes:
    name, value = dice.choice(
        (("codec", b"raw"), ("codec", b"int8"), ("transfer_id", dice.randbytes(16)), ("schema_digest", bytes(16)))
    )
    return poke(data, name, value)


DAMAGE = (flip_bits, truncate, extend, fit_length, overwrite_number, overwrite_text)


@pytest.mark.parametrize("mutations", [SOME, pytest.param(ALL, marks=pytest.mark.slow)])
def test_no_damaged_frame_is_ever_placed(mutations: int) -> None:
    """93 scenarios, B9 and B10; scorecard line 10: accepted 0 of 10^5, over all codecs."""
    dice = random.Random(2024)
    originals = [*every_frame(dice), *every_end(dice)]
    arena, accepted, unchanged, reasons = new_arena(), 0, 0, Counter[str]()
    for _ in range(mutations):
        original = dice.choice(originals)
        data = dice.choice(DAMAGE)(original, dice)
        if data == original:
            unchanged += 1
            continue
        try:
            receive(data, arena)
            accepted += 1
        except FrameError as error:
            reasons[error.reason] += 1
    assert accepted == 0
    assert not arena.array.any()
    assert reasons["checksum"] > 0.3 * mutations and unchanged < 0.1 * mutations  # not all of it is caught by luck
    assert {"length", "magic", "version", "kind", "range", "codec", "checksum"} <= set(reasons)


def test_the_undamaged_frames_are_placed() -> None:
    dice, arena = random.Random(1), new_arena()
    for data in every_frame(dice):
        assert receive(data, arena) == frames.checksum_of(data)
    assert arena.array.any()
    assert receive(end_frame(dice), arena) == END
    assert receive(end_frame(dice, END_OF_EMBEDDING), arena) == END_OF_EMBEDDING


# -- forgery -----------------------------------------------------------------------------------------------------------
def test_resealing_by_hand_is_sealing() -> None:
    data = data_frame("raw", 0, random.Random(1))
    assert reseal(data) == data


def test_twenty_thousand_forged_frames_are_refused_or_harmless() -> None:
    """A sealed lie gets no further than its own reservation, and raises nothing but FrameError."""
    dice = random.Random(7)
    originals = [*every_frame(dice), *every_end(dice)]
    arena, placed = new_arena(), 0
    for _ in range(20_000):
        data = dice.choice(DAMAGE)(dice.choice(originals), dice)
        try:
            receive(reseal(data) if len(data) >= HEADER_BYTES else data, arena)
            placed += 1
        except FrameError:
            pass
    assert placed  # a flipped payload bit under a new checksum is nobody's to notice


@every_encoding
def test_forged_payloads_are_refused_or_decode_to_finite_numbers(codec: str, level: int) -> None:
    """Under a header that is true. A codec that loses nothing may hold anything: its numbers are the source's."""
    dice, arena = random.Random(11), new_arena()
    originals = [data_frame(codec, level, dice) for _ in range(4)]
    for _ in range(400):
        try:
            receive(reseal(mutate_payload(dice.choice(originals), dice)), arena)
        except FrameError as error:
            assert error.reason in {"payload", "length"}
        if not codecs.get(codec).lossless:
            assert np.isfinite(elements.to_float32(arena.array, KV.dtype)).all()


def mutate_payload(data: bytes, dice: random.Random) -> bytes:
    """A few bytes anywhere, or a whole stretch, to values that are often extreme."""
    changed = bytearray(data)
    start, length = dice.randrange(HEADER_BYTES, len(data)), dice.choice((1, 1, 2, 4, 64))
    for offset in range(start, min(start + length, len(data))):
        changed[offset] = dice.choice((0, 0x7F, 0x80, 0xFF, dice.randrange(256)))
    return bytes(changed)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("magic", b"TKV2", "magic"),
        ("version", 2, "version"),
        ("tables", 1, "codec"),
        ("kind", 0, "kind"),
        ("kind", 8, "kind"),
        ("kind", FrameKind.ACK, "length"),
        ("stream", 1, "range"),
        ("layer_end", KV.layers + 1, "range"),
        ("layer_end", 0xFFFF, "range"),
        ("layer_start", 0xFFFF, "range"),
        ("head_end", KV.heads + 1, "range"),
        ("head_end", 0, "range"),
        ("tp_size", 0, "range"),
        ("tp_rank", 1, "range"),
        ("token_start", 0xFFFF_FFFF, "range"),
        ("token_end", 0xFFFF_FFFF, "range"),
        ("token_end", 0, "range"),
        ("raw_bytes", 0, "length"),
        ("raw_bytes", 1, "length"),
        ("raw_bytes", 0xFFFF_FFFF, "length"),
        ("payload_bytes", 0, "length"),
        ("payload_bytes", 0xFFFF_FFFF, "length"),
        ("schema_digest", bytes(16), "schema"),
        ("codec", b"", "codec"),
        ("codec", b"int8\0x", "codec"),
        ("codec", b"../../etc/passwd", "codec"),
        ("codec", b"elements", "codec"),
        ("codec", b"int8", "length"),
        ("level", 1, "codec"),
    ],
)
def test_a_sealed_lie_is_refused_for_what_it_is(name: str, value: int | bytes, reason: str) -> None:
    arena = new_arena()
    with pytest.raises(FrameError, match=f"^{reason}$"):
        receive(reseal(poke(data_frame("raw", 0, random.Random(1)), name, value)), arena)
    assert not arena.array.any()


def test_tokens_beyond_the_table_are_refused() -> None:
    data = data_frame("raw", 0, random.Random(1))
    moved = poke(poke(data, "token_start", 17), "token_end", 33)  # same size, one token past the reservation
    arena = new_arena()
    with pytest.raises(FrameError, match="range"):
        receive(reseal(moved), arena)
    assert not arena.array.any()


@pytest.mark.parametrize(
    "numbers",
    [
        (0, 5),  # no branch, and a token
        (1, 0),  # nothing to go on from
        (2, 0, 0),
        (2, 0, 0, 5),  # a token that is nobody's
        (2, 1, 0),  # a token that is not there
        (2, 0, 0xFFFF_FFFF, 5),
        (2, 1, 0xFFFF_FFFF, 5),  # 1 if lengths were added in 32 bits
        (3, 5),  # fewer lengths than branches
        (limits.CHOICES_MAX + 1, *[0] * limits.CHOICES_MAX, 1, 5),  # more choices than anybody may ask for
        (0xFFFF_FFFF, *[0] * 1_000, 1, 5),
    ],
)
def test_a_sealed_end_that_contradicts_itself_is_refused(numbers: tuple[int, ...]) -> None:
    header = frames.parse_header_untrusted(end_frame(random.Random(1)))
    body = struct.pack(f"<QIi{len(numbers)}I", 0, 0, 0, *numbers)
    data = frames.seal(replace(header, payload_bytes=0), [body])
    with pytest.raises(FrameError, match="payload"):
        receive(data, new_arena())


# -- memory ------------------------------------------------------------------------------------------------------------
def huge_payload(data: bytes) -> bytes:
    return poke(data, "payload_bytes", 0xFFFF_FFFF)


def huge_atom(codec: bytes) -> Callable[[bytes], bytes]:
    """The largest atom that any frame may claim, in a frame of a few bytes."""

    def claim(data: bytes) -> bytes:
        tokens = limits.FRAME_PAYLOAD_BYTES_MAX // KV.token_layer_bytes
        changes = {"layer_start": 0, "layer_end": 1, "token_start": 0, "token_end": tokens}
        for name, value in changes.items():
            data = poke(data, name, value)
        return poke(poke(data, "raw_bytes", tokens * KV.token_layer_bytes), "codec", codec)

    return claim


def huge_end(data: bytes) -> bytes:
    """2^32 - 1 branches in a body of a few bytes."""
    header = replace(frames.parse_header_untrusted(end_frame(random.Random(1))), payload_bytes=0)
    return frames.seal(header, [struct.pack("<QIiI2I", 0, 0, 0, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF)])


def huge_branch(data: bytes) -> bytes:
    header = replace(frames.parse_header_untrusted(end_frame(random.Random(1))), payload_bytes=0)
    return frames.seal(header, [struct.pack("<QIiI2I", 0, 0, 0, 1, 0xFFFF_FFFF, 1)])


CLAIMS = [huge_payload, huge_end, huge_branch, *(huge_atom(name.encode()) for name in codecs.names())]


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_of_size_costs_nothing(claim: Callable[[bytes], bytes]) -> None:
    """Nothing is allocated for a length that the frame's own length does not bear out (scenarios B10, B16)."""
    data = reseal(claim(data_frame("raw", 0, random.Random(1))))
    arena = Arena(SCHEMA, columns=1, block_size=1)
    table = (0,) * (limits.FRAME_PAYLOAD_BYTES_MAX // KV.token_layer_bytes)  # a reservation that is large enough
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            header = frames.parse_header_untrusted(data)
            if header.kind is FrameKind.DATA:
                DecodeJob(frame=data, header=header, table=table, codecs=codec_set()).run(arena)
            frames.parse_end_untrusted(frames.payload_of(data))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 << 10


@every_encoding
def test_a_forged_payload_costs_no_more_memory_than_an_honest_one(codec: str, level: int) -> None:
    """Whatever a payload says, what is allocated for it follows from the declared shape."""
    dice, made = random.Random(3), codec_set().get(codec)
    atom = synthetic.atom(KV, 0, 2_048)  # large beside a codec's constant scratch
    honest = bytes(made.encode(atom, level))

    def peak_bytes(payload: bytes) -> int:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with contextlib.suppress(FrameError):
            made.decode_untrusted(memoryview(payload), atom.shape, level)
        return tracemalloc.get_traced_memory()[1] - before

    peak_bytes(honest)  # kernels are compiled
    tracemalloc.start()
    try:
        honest_bytes = peak_bytes(honest)
        forged_bytes = max(
            peak_bytes(mutate_payload(bytes(HEADER_BYTES) + honest, dice)[HEADER_BYTES:]) for _ in range(100)
        )
    finally:
        tracemalloc.stop()
    assert honest_bytes <= ALLOWANCE * atom.shape.raw_bytes
    assert forged_bytes <= honest_bytes + (64 << 10)  # errors and their tracebacks
