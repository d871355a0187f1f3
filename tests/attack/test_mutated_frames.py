"""Attack: damaged and forged frames against the whole receiving path. None is placed, and none raises anything else.

Two attackers. The first damages: 100,000 frames with flipped bits, cut and extended tails, and header fields that hold
other plausible values, without a new checksum. The second can also seal, so its frames are intact and only lie.
"""

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
from kv_transfer.codecs import codecs, elements
from kv_transfer.frame import HEADER_BYTES, End, FrameHeader, FrameKind
from kv_transfer.jobs import DecodeJob, EncodeJob

KV = Stream(name="kv", layers=3, heads=2, head_dim=8, dtype="bfloat16")
SCHEMA = CacheSchema("m", (KV,))
TOKENS = 32
TABLE = (1, 0)
MUTATIONS = 100_000

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
    "reserved": (108, "<I"),
}
END = End(branches=((5, 6), (), (7,)), frames=3, digest=11)  # the second choice is over
NUMBERS = [name for name, (_, form) in LAYOUT.items() if not form.endswith("s")]


def new_arena() -> Arena:
    return Arena(SCHEMA, columns=2, block_size=16)


def data_frame(codec: str, dice: random.Random) -> bytes:
    arena = new_arena()
    values = np.random.default_rng(dice.getrandbits(32)).standard_normal((3, 2, 2, TOKENS, 8)).astype(np.float32)
    arena.write(TABLE, (0, 3), (0, TOKENS), None, elements.from_float32(values, KV.dtype))
    layer, token = dice.randrange(2), dice.randrange(0, 8)
    header = FrameHeader(
        kind=FrameKind.DATA,
        transfer_id=dice.randbytes(16),
        epoch=dice.randrange(9),
        sequence=dice.randrange(99),
        schema_digest=SCHEMA.digest,
        codec=codec,
        layer_start=layer,
        layer_end=layer + 1,
        token_start=token,
        token_end=token + 16,
        head_end=2,
    )
    return EncodeJob(header=header, table=TABLE).run(arena)


def end_frame(dice: random.Random) -> bytes:
    header = FrameHeader(
        kind=FrameKind.END, transfer_id=dice.randbytes(16), epoch=1, sequence=4, schema_digest=SCHEMA.digest
    )
    return frames.seal(header, [frames.serialize_end(END)])


def receive(data: bytes, arena: Arena) -> object:
    """What a Target and its job do with a frame, in their order."""
    header = frames.parse_header_untrusted(data)
    if header.kind is not FrameKind.DATA:
        frames.verify_checksum_untrusted(data)
        return frames.parse_end_untrusted(frames.payload_of(data)) if header.kind is FrameKind.END else header
    frames.check_atom_untrusted(header, KV)
    return DecodeJob(frame=data, header=header, table=TABLE).run(arena)


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


def test_no_damaged_frame_is_ever_placed() -> None:
    """93 scenarios, B9 and B10; scorecard line 10: accepted 0 of 10^5."""
    dice = random.Random(2024)
    originals = [data_frame(codec, dice) for codec in codecs.names() for _ in range(8)] + [end_frame(dice)] * 4
    arena, accepted, unchanged, reasons = new_arena(), 0, 0, Counter[str]()
    for _ in range(MUTATIONS):
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
    assert reasons["checksum"] > 0.3 * MUTATIONS and unchanged < 0.1 * MUTATIONS  # not all of it is caught by luck
    assert {"length", "magic", "version", "kind", "range", "codec", "checksum"} <= set(reasons)


def test_the_undamaged_frames_are_placed() -> None:
    dice, arena = random.Random(1), new_arena()
    for codec in codecs.names():
        data = data_frame(codec, dice)
        assert frames.parse_header_untrusted(data).codec == codec
        assert receive(data, arena) == frames.checksum_of(data)
    assert arena.array.any()
    assert receive(end_frame(dice), arena) == END


# -- forgery -----------------------------------------------------------------------------------------------------------
def test_resealing_by_hand_is_sealing() -> None:
    data = data_frame("raw", random.Random(1))
    assert reseal(data) == data


def test_twenty_thousand_forged_frames_are_refused_or_harmless() -> None:
    """A sealed lie gets no further than its own reservation, and raises nothing but FrameError."""
    dice = random.Random(7)
    originals = [data_frame(codec, dice) for codec in codecs.names() for _ in range(8)] + [end_frame(dice)] * 4
    arena, placed = new_arena(), 0
    for _ in range(20_000):
        data = dice.choice(DAMAGE)(dice.choice(originals), dice)
        try:
            receive(reseal(data) if len(data) >= HEADER_BYTES else data, arena)
            placed += 1
        except FrameError:
            pass
    assert placed  # a flipped payload bit under a new checksum is nobody's to notice


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("magic", b"TKV2", "magic"),
        ("version", 2, "version"),
        ("reserved", 1, "version"),
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
        receive(reseal(poke(data_frame("raw", random.Random(1)), name, value)), arena)
    assert not arena.array.any()


def test_tokens_beyond_the_table_are_refused() -> None:
    data = data_frame("raw", random.Random(1))
    moved = poke(poke(data, "token_start", 17), "token_end", 33)  # same size, one token past the reservation
    arena = new_arena()
    with pytest.raises(FrameError, match="range"):
        receive(reseal(moved), arena)
    assert not arena.array.any()


@pytest.mark.parametrize(
    "numbers",
    [
        (0,),  # no branch, and no token
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
    body = struct.pack(f"<QI{len(numbers)}I", 0, 0, *numbers)
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
    return frames.seal(header, [struct.pack("<QII2I", 0, 0, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF)])


def huge_branch(data: bytes) -> bytes:
    header = replace(frames.parse_header_untrusted(end_frame(random.Random(1))), payload_bytes=0)
    return frames.seal(header, [struct.pack("<QII2I", 0, 0, 1, 0xFFFF_FFFF, 1)])


@pytest.mark.parametrize("claim", [huge_payload, huge_atom(b"raw"), huge_atom(b"int8"), huge_end, huge_branch])
def test_a_claim_of_size_costs_nothing(claim: Callable[[bytes], bytes]) -> None:
    """Nothing is allocated for a length that the frame's own length does not bear out (scenarios B10, B16)."""
    data = reseal(claim(data_frame("raw", random.Random(1))))
    arena = Arena(SCHEMA, columns=1, block_size=1)
    table = (0,) * (limits.FRAME_PAYLOAD_BYTES_MAX // KV.token_layer_bytes)  # a reservation that is large enough
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            header = frames.parse_header_untrusted(data)
            if header.kind is FrameKind.DATA:
                DecodeJob(frame=data, header=header, table=table).run(arena)
            frames.parse_end_untrusted(frames.payload_of(data))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 64 << 10
