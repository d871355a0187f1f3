"""Measuring a codec: through its own bytes, with headers, in the atoms of a transfer."""

import numpy as np
import pytest

from engine.kv.schema import Stream
from kv_transfer.calibration import Floats
from kv_transfer.codecs import CodecSet
from kv_transfer.frame import HEADER_BYTES
from kv_transfer.measure import CHUNK_TOKENS, cut, rates, send

STREAM = Stream(name="kv", layers=3, heads=2, head_dim=16, dtype="bfloat16")


def kv_of(tokens: int, scale: float = 1.0) -> Floats:
    """Numbers that bfloat16 holds exactly."""
    rng = np.random.default_rng(0)
    return (rng.integers(-64, 64, (3, 2, 2, tokens, 16)) / 8 * scale).astype(np.float32)


@pytest.fixture(scope="module")
def codecs() -> CodecSet:
    return CodecSet(STREAM)


def test_raw_comes_back_as_it_was_for_sixteen_bits_and_headers(codecs: CodecSet) -> None:
    kv_LHPTD = kv_of(CHUNK_TOKENS + 40)
    received = send(codecs, "raw", 0, kv_LHPTD)
    assert np.array_equal(received.kv_LHPTD, kv_LHPTD)
    assert received.sent_bytes == 2 * kv_LHPTD.size + 2 * HEADER_BYTES
    assert received.bits_per_element == pytest.approx(16 + 16 * HEADER_BYTES / kv_LHPTD.size)


def test_a_lossy_codec_loses_within_its_bound_and_sends_its_payloads(codecs: CodecSet) -> None:
    kv_LHPTD = kv_of(CHUNK_TOKENS)
    received = send(codecs, "int8", 0, kv_LHPTD)
    payloads = [codecs.get("int8").encode(atom, 0) for atom in cut(STREAM, kv_LHPTD)]
    assert received.sent_bytes == sum(map(len, payloads)) + HEADER_BYTES * len(payloads)
    assert 0 < np.abs(received.kv_LHPTD - kv_LHPTD).max() < 0.1


def test_what_a_codec_cannot_encode_is_sent_raw(codecs: CodecSet) -> None:
    kv_LHPTD = kv_of(32)
    kv_LHPTD[0, 0, 0, 0, 0] = np.inf
    received = send(codecs, "int8", 0, kv_LHPTD)
    assert np.array_equal(received.kv_LHPTD, kv_LHPTD)
    assert received.bits_per_element > 16


def test_every_number_is_in_one_atom() -> None:
    wide = Stream(name="kv", layers=6, heads=8, head_dim=128, dtype="bfloat16")
    kv_LHPTD = np.zeros((6, 8, 2, CHUNK_TOKENS + 1, 128), np.float32)
    shapes = [atom.shape for atom in cut(wide, kv_LHPTD)]
    assert len(shapes) > 2, "layers are split where frames would be too long"
    cells = [(layer, token) for shape in shapes for layer in range(*shape.layers) for token in range(*shape.tokens)]
    assert sorted(cells) == [(layer, token) for layer in range(6) for token in range(CHUNK_TOKENS + 1)]


def test_rates_are_positive(codecs: CodecSet) -> None:
    measured = rates(codecs, "int8", 0, kv_of(64))
    assert measured.encode_mb_s > 0 and measured.decode_mb_s > 0
