"""Jobs: what one arena's job reads, another's job writes, whatever the block sizes; damage writes nothing."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base import limits
from engine.base.errors import FrameError
from engine.kv.arena import Arena
from engine.kv.schema import CacheSchema, Stream
from kv_transfer import frame as frames
from kv_transfer.codecs import CodecSet, elements
from kv_transfer.frame import FrameHeader, FrameKind
from kv_transfer.jobs import DecodeJob, EncodeJob, atoms

KV = Stream(name="kv", layers=3, heads=2, head_dim=16, dtype="bfloat16")
SCHEMA = CacheSchema("m", (KV,))
CODECS = CodecSet(KV)
TOKENS = 40
BFLOAT16_INFINITY = 0x7F80


def source_arena() -> tuple[Arena, tuple[int, ...]]:
    arena = Arena(SCHEMA, columns=6, block_size=16)
    table = (4, 0, 2)
    values = np.random.default_rng(1).standard_normal((3, 2, 2, TOKENS, 16)).astype(np.float32)
    arena.write(table, (0, 3), (0, TOKENS), None, elements.from_float32(values, KV.dtype))
    return arena, table


def target_arena() -> tuple[Arena, tuple[int, ...]]:
    return Arena(SCHEMA, columns=9, block_size=8), (8, 1, 0, 5, 3)


def header(codec: str = "raw", **changes: int) -> FrameHeader:
    data = FrameHeader(
        kind=FrameKind.DATA,
        transfer_id=bytes(16),
        epoch=1,
        sequence=0,
        schema_digest=SCHEMA.digest,
        codec=codec,
        layer_start=1,
        layer_end=3,
        token_start=5,
        token_end=37,
        head_end=2,
    )
    return replace(data, **changes)


def decode(data: bytes, arena: Arena, table: tuple[int, ...]) -> int:
    return DecodeJob(frame=data, header=frames.parse_header_untrusted(data), table=table, codecs=CODECS).run(arena)


def encode(header: FrameHeader, arena: Arena, table: tuple[int, ...]) -> bytes:
    return EncodeJob(header=header, table=table, codecs=CODECS).run(arena)


def numbers(arena: Arena, table: tuple[int, ...], layers: tuple[int, int], tokens: tuple[int, int]) -> np.ndarray:
    return elements.to_float32(arena.read(table, layers, tokens), KV.dtype)


def test_raw_arrives_bit_for_bit_and_nothing_else_is_touched() -> None:
    (source, source_table), (target, target_table) = source_arena(), target_arena()
    data = encode(header(), source, source_table)
    assert decode(data, target, target_table) == frames.checksum_of(data)
    sent = source.read(source_table, (1, 3), (5, 37))
    np.testing.assert_array_equal(target.read(target_table, (1, 3), (5, 37)), sent)
    assert np.count_nonzero(target.array) == np.count_nonzero(sent)


def test_a_lossy_codec_arrives_within_its_loss_and_smaller() -> None:
    (source, source_table), (target, target_table) = source_arena(), target_arena()
    data = encode(header("int8"), source, source_table)
    got = frames.parse_header_untrusted(data)
    assert (got.codec, got.raw_bytes) == ("int8", 2 * 32 * KV.token_layer_bytes)
    assert got.payload_bytes < 0.6 * got.raw_bytes
    decode(data, target, target_table)
    sent, placed = numbers(source, source_table, (1, 3), (5, 37)), numbers(target, target_table, (1, 3), (5, 37))
    assert 0 < np.abs(placed - sent).max() <= 0.006 * np.abs(sent).max()


def test_numbers_that_a_codec_cannot_hold_go_raw() -> None:
    (source, table), (target, target_table) = source_arena(), target_arena()
    source.unit_view(table[1] * KV.layers + 2).view(np.uint16)[0, 0, 3, 4] = BFLOAT16_INFINITY
    data = encode(header("int8"), source, table)
    assert frames.parse_header_untrusted(data).codec == "raw"
    decode(data, target, target_table)
    np.testing.assert_array_equal(target.read(target_table, (1, 3), (5, 37)), source.read(table, (1, 3), (5, 37)))


def test_an_atom_that_would_grow_goes_raw() -> None:
    source, table = source_arena()
    data = encode(header("int8", token_end=6, tables=0x1A2B), source, table)  # a scale per number of one key
    got = frames.parse_header_untrusted(data)
    assert (got.codec, got.payload_bytes, got.tables) == ("raw", got.raw_bytes, 0)


@pytest.mark.parametrize("at", [9, 30, frames.HEADER_BYTES, -1])
def test_a_damaged_frame_is_refused_before_anything_is_written(at: int) -> None:
    (source, source_table), (target, target_table) = source_arena(), target_arena()
    data = bytearray(encode(header(), source, source_table))
    data[at] ^= 1
    with pytest.raises(FrameError, match="checksum"):
        decode(bytes(data), target, target_table)
    assert not target.array.any()


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("schema", {"schema_digest": bytes(16)}),
        ("range", {"token_start": 9, "token_end": 41}),  # the table ends at 40
        ("range", {"layer_start": 2, "layer_end": 4}),
        ("codec", {"codec": "unheard-of"}),
        ("codec", {"level": 9}),
        ("codec", {"tables": 0x1A2B}),  # `raw` has none
        ("length", {"codec": "int8"}),
    ],
)
def test_an_intact_frame_that_does_not_fit_is_refused(reason: str, change: dict[str, object]) -> None:
    (source, source_table), (target, target_table) = source_arena(), target_arena()
    data = encode(header(), source, source_table)
    forged = frames.seal(replace(frames.parse_header_untrusted(data), **change), [frames.payload_of(data)])
    with pytest.raises(FrameError, match=reason):
        decode(forged, target, target_table)
    assert not target.array.any()


# -- atoms -------------------------------------------------------------------------------------------------------------
def spans(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layers=spans(12), tokens=spans(300), tokens_fitting=st.integers(1, 2_000), multiple=st.sampled_from([1, 16, 64]))
def test_a_region_is_covered_exactly_once(
    layers: tuple[int, int], tokens: tuple[int, int], tokens_fitting: int, multiple: int
) -> None:
    max_bytes = tokens_fitting * KV.token_layer_bytes
    pieces = list(atoms(KV, layers, tokens, max_bytes, multiple))
    cells = np.zeros((12, 300), int)
    for (layer_start, layer_end), (token_start, token_end) in pieces:
        assert 0 < (layer_end - layer_start) * (token_end - token_start) <= tokens_fitting
        cells[layer_start:layer_end, token_start:token_end] += 1
    expected = np.zeros_like(cells)
    expected[slice(*layers), slice(*tokens)] = 1
    np.testing.assert_array_equal(cells, expected)
    assert pieces == list(atoms(KV, layers, tokens, max_bytes, multiple))


def test_tokens_stay_together_while_a_layer_of_them_fits() -> None:
    a_layer = 100 * KV.token_layer_bytes
    assert list(atoms(KV, (0, 3), (5, 105), 3 * a_layer)) == [((0, 3), (5, 105))]
    assert list(atoms(KV, (0, 3), (5, 105), 2 * a_layer)) == [((0, 2), (5, 105)), ((2, 3), (5, 105))]
    assert list(atoms(KV, (0, 2), (5, 105), a_layer - 1)) == [
        ((0, 1), (5, 69)),
        ((0, 1), (69, 105)),
        ((1, 2), (5, 69)),
        ((1, 2), (69, 105)),
    ]


def test_a_frame_is_large_by_default_and_never_too_large() -> None:
    stream = Stream(name="kv", layers=30, heads=3, head_dim=64, dtype="bfloat16")
    sizes = [
        (b - a) * (d - c) * stream.token_layer_bytes
        for (a, b), (c, d) in atoms(stream, (0, limits.LAYERS_PER_GROUP), (0, 512))
    ]
    assert max(sizes) <= limits.FRAME_PAYLOAD_BYTES_MAX
    assert len(sizes) <= 2 * sum(sizes) / limits.FRAME_PAYLOAD_BYTES_MAX + 1


def test_a_token_too_large_for_a_frame_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="one token of one layer"):
        list(atoms(KV, (0, 1), (0, 1), KV.token_layer_bytes - 1))
